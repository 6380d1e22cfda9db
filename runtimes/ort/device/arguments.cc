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

std::vector<int64_t> whole_numbers(const std::string& option, const std::string& text, int64_t least) {
  std::vector<int64_t> values;
  for (const std::string& part : split(text)) values.push_back(whole_number(option, part, least));
  return values;
}

const std::string& mode(const std::string& option, const std::string& text) {
  if (text != "native" && text != "bodies" && text != "dense") {
    throw UsageError(option + " " + text + ": expected native, bodies or dense");
  }
  return text;
}

}  // namespace

const char* usage() {
  return "usage: qsparse-device-bench [options] BUNDLE\n"
         "Runs a bundle on this machine: checks that it generates the tokens recorded in its manifest, then times it.\n"
         "\n"
         "  -p N,..             tokens of the prompt tests pp (default 512; 0: leave them out)\n"
         "  -n N,..             tokens of the generation tests tg (default 128; 0: leave them out)\n"
         "  -r N                repetitions after one that is not counted (default 5)\n"
         "  -t N,..             threads; 0: all cores (default 0)\n"
         "  --modes M,..        native, bodies, dense (default: native and bodies, or bodies for a bundle without a "
         "library)\n"
         "  --ids I,I,..        generate -n tokens after these ids instead, on the first of --modes and -t, and "
         "measure\n"
         "                      nothing\n"
         "  --session MODE      open the bundle in this mode and answer lines of JSON on stdin (docs/benchmarks.md)\n"
         "  --device NAME       what reports call this machine\n"
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
      made.prompt_tokens = whole_numbers(word, value(), 0);
    } else if (word == "-n") {
      made.generate_tokens = whole_numbers(word, value(), 0);
    } else if (word == "-r") {
      made.repetitions = whole_number(word, value(), 1);
    } else if (word == "-t") {
      made.threads.clear();
      for (const int64_t threads : whole_numbers(word, value(), 0)) made.threads.push_back(static_cast<int>(threads));
    } else if (word == "--modes") {
      made.modes = split(value());
      for (const std::string& given : made.modes) mode(word, given);
    } else if (word == "--session") {
      made.session = mode(word, value());
    } else if (word == "--device") {
      made.device = value();
    } else if (word == "--ids") {
      made.ids = whole_numbers(word, value(), 0);
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
