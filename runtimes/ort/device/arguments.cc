#include "arguments.h"

#include <algorithm>
#include <cstdlib>

namespace qsparse_device {
namespace {

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  for (size_t start = 0; start <= text.size();) {
    const size_t comma = std::min(text.find(',', start), text.size());
    parts.push_back(text.substr(start, comma - start));
    start = comma + 1;
  }
  return parts;
}

int64_t whole_number(const std::string& option, const std::string& text, int64_t least) {
  char* end = nullptr;
  const long long value = strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end != '\0' || value < least) {
    throw UsageError(option + " " + text + ": expected a whole number, at least " + std::to_string(least));
  }
  return value;
}

}  // namespace

const char* usage() {
  return "usage: qsparse-device-bench [options] BUNDLE\n"
         "Runs a bundle on this machine: checks that it generates the tokens recorded in its manifest, then times it.\n"
         "\n"
         "  -p N                tokens of the prompt test pp (default 512; 0: leave it out)\n"
         "  -n N                tokens of the generation test tg (default 128; 0: leave it out)\n"
         "  -r N                repetitions after one that is not counted (default 5)\n"
         "  -t N,..             threads; 0: all cores (default 0)\n"
         "  --modes M,..        native, bodies (default: both, or bodies for a bundle without a library)\n"
         "  --ids I,I,..        generate -n tokens after these ids instead, on the first of --modes and -t, and "
         "measure\n"
         "                      nothing\n"
         "  --unchecked         time a bundle whose manifest records no tokens to check\n"
         "  --onnxruntime PATH  libonnxruntime.so to load (default: the system's own)\n"
         "\n"
         "One JSON document on stdout, talk on stderr. Exit codes: 0 done, 1 failed or other tokens, 2 wrong usage.\n";
}

Arguments parse_arguments(int argc, char** argv) {
  Arguments made;
  const std::vector<std::string> words(argv + 1, argv + argc);
  for (size_t i = 0; i < words.size(); ++i) {
    const std::string& word = words[i];
    if (word == "-h" || word == "--help") {
      made.help = true;
      return made;
    }
    if (word == "--unchecked") {
      made.unchecked = true;
      continue;
    }
    if (word.empty() || word[0] != '-') {
      if (!made.bundle.empty()) throw UsageError("two bundles given: " + made.bundle + " and " + word);
      made.bundle = word;
      continue;
    }
    const auto value = [&]() -> const std::string& {
      if (i + 1 == words.size()) throw UsageError(word + " needs a value");
      return words[++i];
    };
    if (word == "-p") {
      made.prompt_tokens = whole_number(word, value(), 0);
    } else if (word == "-n") {
      made.generate_tokens = whole_number(word, value(), 0);
    } else if (word == "-r") {
      made.repetitions = whole_number(word, value(), 1);
    } else if (word == "-t") {
      made.threads.clear();
      for (const std::string& part : split(value())) {
        made.threads.push_back(static_cast<int>(whole_number(word, part, 0)));
      }
    } else if (word == "--modes") {
      made.modes = split(value());
      for (const std::string& mode : made.modes) {
        if (mode != "native" && mode != "bodies") throw UsageError("--modes " + mode + ": expected native or bodies");
      }
    } else if (word == "--ids") {
      for (const std::string& part : split(value())) made.ids.push_back(whole_number(word, part, 0));
    } else if (word == "--onnxruntime") {
      made.onnxruntime = value();
    } else {
      throw UsageError("unknown option " + word);
    }
  }
  if (made.bundle.empty()) throw UsageError("no bundle given");
  return made;
}

}  // namespace qsparse_device
