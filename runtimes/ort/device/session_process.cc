#include "session_process.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <vector>

#include "machine.h"
#include "measure.h"

namespace qsparse_device {
namespace {

class WrongTokens : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

Json agreement(double steady, int64_t agree, size_t of) {
  Json checked = Json::object();
  checked.set("steady", steady);
  checked.set("agree", agree);
  checked.set("of", static_cast<int64_t>(of));
  return checked;
}

int64_t leading_same(const std::vector<int64_t>& wanted, const std::vector<int64_t>& got) {
  return std::mismatch(wanted.begin(), wanted.end(), got.begin()).first - wanted.begin();
}

// What was generated with every mask open at export, by these kernels on another processor: PyTorch did not judge it,
// so that a difference is told and not judged. null where nothing was recorded.
Json compare_dense(const Bundle& bundle, Decoder& decoder) {
  const Json& record = bundle.activity("dense");
  if (record.is_null()) return Json();
  const std::vector<int64_t> wanted = record.at("greedy_ids", "bench.dense").integers("bench.dense.greedy_ids");
  const std::vector<int64_t> got = decoder.generate({bundle.first_token()}, static_cast<int64_t>(wanted.size()));
  return agreement(0, leading_same(wanted, got), wanted.size());
}

// Generates the recorded tokens again. The first of them, which the manifest calls steady, must come out; at later ones
// rounding may decide, and processors differ. {"steady", "agree", "of"}: tokens; null where none is recorded and that
// was allowed.
Json check_tokens(const Bundle& bundle, const std::string& mode, Decoder& decoder, bool unchecked) {
  if (mode == "dense") return compare_dense(bundle, decoder);
  const std::string what = "parity.paths";
  const Json& record = bundle.recorded(mode);
  const std::vector<int64_t> prompt = bundle.recorded_prompt();
  if (record.is_null() || prompt.empty()) {
    if (unchecked) return Json();
    throw WrongTokens("the manifest records no tokens of the " + mode +
                      " path: export with --verify full, or time it with --unchecked");
  }
  const double steady = record.at("steady_greedy_tokens", what).number(what + ".steady_greedy_tokens");
  const std::vector<int64_t> wanted = record.at("greedy_ids", what).integers(what + ".greedy_ids");
  const std::vector<int64_t> got = decoder.generate(prompt, static_cast<int64_t>(wanted.size()));
  const int64_t agree = leading_same(wanted, got);
  if (got != wanted && static_cast<double>(agree) < std::max(steady, 1.0) && !(unchecked && steady < 1)) {
    throw WrongTokens("the " + mode + " path generates other tokens than at export: " + Json(got).to_string() +
                      ", expected " + Json(wanted).to_string() +
                      (steady < 1 ? ". Rounding alone moves the first token of this model: --unchecked" : ""));
  }
  return agreement(steady, agree, wanted.size());
}

Json check(const Arguments& arguments, const Bundle& bundle, const Way& way, Opened& opened) {
  Json variants = Json::list(), answer = Json::object();
  const KernelLibrary* kernels = opened.kernels.get();
  if (kernels != nullptr) {
    for (const std::string& name : kernels->supported()) variants.add(name);
  }
  answer.set("checked_tokens", check_tokens(bundle, way.mode, *opened.decoder, arguments.unchecked));
  answer.set("onnxruntime", opened.runtime->version());
  answer.set("library", kernels != nullptr ? Json(kernels->version()) : Json());
  answer.set("supported_variants", variants);
  return answer;
}

Json prefill(const Bundle& bundle, Decoder& decoder, int64_t tokens) {
  const std::vector<int64_t> ids = prompt_ids(bundle.vocabulary(), tokens);
  decoder.reset();
  const double start = now_s();
  decoder.step(ids);  // the choice of the token included: it takes microseconds
  const double seconds = now_s() - start;
  Json answer = Json::object();
  answer.set("seconds", seconds);
  answer.set("first_token_seconds", seconds);
  return answer;
}

Json generate(const Bundle& bundle, Decoder& decoder, int64_t tokens) {
  decoder.reset();
  Json seconds = Json::list();
  int64_t token = bundle.first_token();
  for (int64_t i = 0; i < tokens; ++i) {
    const double start = now_s();
    token = decoder.step({token});
    seconds.add(now_s() - start);
  }
  Json answer = Json::object();
  answer.set("seconds_per_token", seconds);
  return answer;
}

Json answer(const Arguments& arguments, const Bundle& bundle, const Way& way, Opened& opened, const Json& command) {
  const auto tokens = [&](const char* name) {
    const double count = command.at(name, "the command").number(name);
    if (!(count >= 1 && count <= static_cast<double>(bundle.most_positions()))) {
      throw std::runtime_error(command.to_string() + ": the model has " + std::to_string(bundle.most_positions()) +
                               " positions");
    }
    return static_cast<int64_t>(count);
  };
  if (!command.at("prefill", "the command").is_null()) return prefill(bundle, *opened.decoder, tokens("prefill"));
  if (!command.at("generate", "the command").is_null()) return generate(bundle, *opened.decoder, tokens("generate"));
  if (!command.at("check", "the command").is_null()) return check(arguments, bundle, way, opened);
  if (command.at("footprint", "the command").is_null()) {
    throw std::runtime_error(command.to_string() + ": expected prefill, generate, footprint or check");
  }
  Json footprint = Json::object();
  footprint.set("peak_rss_bytes", peak_rss_bytes());
  footprint.set("native_calls", opened.kernels ? opened.kernels->calls() : Json::object());
  return footprint;
}

void say(FILE* answers, const Json& line) {
  fprintf(answers, "%s\n", line.to_string().c_str());
  fflush(answers);
}

int fail(FILE* answers, const std::string& reason, const char* kind) {
  Json line = Json::object();
  line.set("error", reason);
  line.set("kind", kind);
  say(answers, line);
  return 1;
}

bool read_line(FILE* file, std::string* line) {
  line->clear();
  for (int c = getc(file); c != EOF; c = getc(file)) {
    if (c == '\n') return true;
    *line += static_cast<char>(c);
  }
  return !line->empty();
}

}  // namespace

Opened open(const Arguments& arguments, const Bundle& bundle, const Way& way) {
  Opened made{};
  const std::string graph = bundle.graph(way.mode);
  const bool runs_kernels = bundle.runs_kernels(way.mode);
  made.runtime = std::make_unique<OnnxRuntime>(arguments.onnxruntime);
  if (runs_kernels) {
    made.kernels = std::make_unique<KernelLibrary>(bundle.library);
    made.kernels->chosen();  // a forced variant that this processor lacks is refused here, by name
    made.kernels->reset_calls();
  }
  made.rss_before_load_bytes = peak_rss_bytes();
  const double start = now_s();
  made.session = std::make_unique<Session>(*made.runtime, graph, runs_kernels ? bundle.library : "", way.threads);
  made.decoder = std::make_unique<Decoder>(*made.runtime, *made.session);
  made.load_ms = (now_s() - start) * 1000;
  return made;
}

int serve(const Arguments& arguments, const Bundle& bundle, const Way& way, FILE* commands, FILE* answers) {
  try {
    Opened opened = open(arguments, bundle, way);
    Json first = Json::object();
    first.set("load_ms", opened.load_ms);
    first.set("rss_before_load_bytes", opened.rss_before_load_bytes);
    say(answers, first);
    for (std::string line; read_line(commands, &line);) {
      say(answers, answer(arguments, bundle, way, opened, Json::parse(line)));
    }
    return 0;
  } catch (const WrongTokens& error) {
    return fail(answers, error.what(), kWrongTokens);
  } catch (const std::exception& error) {
    return fail(answers, error.what(), "TargetError");
  }
}

}  // namespace qsparse_device
