// qsparse-device-bench: checks and times a bundle on the machine that it was made for, without Python.
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "arguments.h"
#include "decoder.h"
#include "json.h"
#include "kernel_library.h"
#include "machine.h"
#include "measure.h"
#include "onnxruntime.h"

namespace qsparse_device {
namespace {

// What a manifest says of the bundle, as far as this program needs it.
struct Bundle {
  std::string folder;
  Json manifest;
  std::string library;  // path; empty: the bundle has none

  // The record of one way to run it in the parity section, or null.
  const Json& recorded(const std::string& mode) const {
    static const Json null;
    const Json& parity = manifest.at("parity", "manifest.json");
    if (parity.is_null()) return null;
    for (const Json& path : parity.at("paths", "parity").items("parity.paths")) {
      if (path.at("path", "parity.paths").text("parity.paths.path") == mode) return path;
    }
    return null;
  }

  std::vector<int64_t> prompt() const {
    const Json& parity = manifest.at("parity", "manifest.json");
    if (parity.is_null()) return {};
    const Json& ids = parity.at("prompt_ids", "parity");
    return ids.is_null() ? std::vector<int64_t>() : ids.integers("parity.prompt_ids");
  }
};

Bundle read_bundle(const std::string& folder) {
  std::ifstream file(folder + "/manifest.json", std::ios::binary);
  if (!file) throw std::runtime_error(folder + " is no bundle: it has no manifest.json");
  const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  Bundle bundle{folder, Json::parse(text), ""};
  for (const auto& [name, entry] : bundle.manifest.at("files", "manifest.json").members("files")) {
    if (name.size() > 3 && name.substr(name.size() - 3) == ".so") bundle.library = folder + "/" + name;
  }
  return bundle;
}

// One way to run the bundle: a session with or without the kernels, and the loop over it.
struct Opened {
  std::unique_ptr<Session> session;
  std::unique_ptr<Decoder> decoder;
  double load_ms;
};

Opened open(const OnnxRuntime& runtime, const Bundle& bundle, const std::string& mode, int threads) {
  if (mode == "native" && bundle.library.empty()) {
    throw std::runtime_error(bundle.folder + " has no kernel library: it runs with --modes bodies only");
  }
  const double start = now_s();
  auto session = std::make_unique<Session>(runtime, bundle.folder + "/model.onnx",
                                           mode == "native" ? bundle.library : std::string(), threads);
  auto decoder = std::make_unique<Decoder>(runtime, *session);
  return {std::move(session), std::move(decoder), (now_s() - start) * 1000};
}

// Generates the recorded tokens again. The first of them, which the manifest calls steady, must come out; at later ones
// rounding may decide, and processors differ. {"steady", "agree", "of"}: tokens; null where none is recorded and that
// was allowed.
Json check_tokens(const Bundle& bundle, const std::string& mode, Decoder& decoder, bool unchecked) {
  const std::string what = "parity.paths";
  const Json& record = bundle.recorded(mode);
  const std::vector<int64_t> prompt = bundle.prompt();
  if (record.is_null() || prompt.empty()) {
    if (unchecked) return Json();
    throw std::runtime_error("the manifest records no tokens of the " + mode +
                             " path: export with --verify full, or time it with --unchecked");
  }
  const double steady = record.at("steady_greedy_tokens", what).number(what + ".steady_greedy_tokens");
  const std::vector<int64_t> wanted = record.at("greedy_ids", what).integers(what + ".greedy_ids");
  const std::vector<int64_t> got = decoder.generate(prompt, static_cast<int64_t>(wanted.size()));
  const auto agree = std::mismatch(wanted.begin(), wanted.end(), got.begin()).first - wanted.begin();
  const bool all = got == wanted;
  if (!all && static_cast<double>(agree) < std::max(steady, 1.0) && !(unchecked && steady < 1)) {
    throw std::runtime_error("the " + mode + " path generates other tokens than at export: " + Json(got).to_string() +
                             ", expected " + Json(wanted).to_string() +
                             (steady < 1 ? ". Rounding alone moves the first token of this model: --unchecked" : ""));
  }
  Json checked = Json::object();
  checked.set("steady", steady);
  checked.set("agree", static_cast<int64_t>(agree));
  checked.set("of", static_cast<int64_t>(wanted.size()));
  return checked;
}

// {projection: share of channels that its top-k keeps}, the mean over layers, as the manifest configures it.
Json configured_density(const Json& manifest) {
  const Json& rows = manifest.at("sparsity", "manifest.json");
  if (rows.is_null()) return Json();
  std::map<std::string, std::pair<double, int64_t>> sums;
  for (const Json& row : rows.items("sparsity")) {
    const std::string& name = row.at("name", "sparsity").text("sparsity.name");
    const double block = row.at("block", "sparsity").number("sparsity.block");
    const double width = row.at("width", "sparsity").number("sparsity.width");
    const double kept = row.at("k", "sparsity").number("sparsity.k") / (block > 0 ? block : width);
    auto& [sum, count] = sums[name.substr(name.rfind('.') + 1)];
    sum += kept;
    ++count;
  }
  Json density = Json::object();
  for (const auto& [name, sum] : sums) density.set(name, sum.first / static_cast<double>(sum.second));
  return density;
}

Json generate(const Arguments& arguments, const OnnxRuntime& runtime, const Bundle& bundle, KernelLibrary* kernels) {
  const std::string mode = arguments.modes.front();
  Opened opened = open(runtime, bundle, mode, arguments.threads.front());
  if (kernels != nullptr) kernels->reset_calls();
  Json report = Json::object();
  report.set("mode", mode);
  report.set("tokens", Json(opened.decoder->generate(arguments.ids, arguments.generate_tokens)));
  report.set("native_calls", kernels != nullptr ? kernels->calls() : Json::object());
  report.set("onnxruntime", runtime.version());
  return report;
}

Json bench(const Arguments& arguments, const OnnxRuntime& runtime, const Bundle& bundle, KernelLibrary* kernels) {
  std::vector<int64_t> prompt = bundle.prompt();
  if (prompt.empty()) prompt = {0, 1, 2, 3};
  const Protocol protocol{arguments.prompt_tokens, arguments.generate_tokens, arguments.repetitions};
  Json report = Json::object(), rows = Json::list(), load_ms = Json::object(), ttft_ms = Json::object();
  report.set("program", "qsparse-device-bench " QSPARSE_VERSION);
  report.set("bundle", bundle.manifest.at("name", "manifest.json"));
  report.set("target", bundle.manifest.at("target", "manifest.json"));
  report.set("onnxruntime", runtime.version());
  report.set("machine", describe_machine());
  report.set("state_before", describe_state());
  Json variants = Json::object();
  Json checked = Json::object();
  for (const std::string& mode : arguments.modes) {  // every way is right before any is timed
    Opened opened = open(runtime, bundle, mode, arguments.threads.front());
    checked.set(mode, check_tokens(bundle, mode, *opened.decoder, arguments.unchecked));
    load_ms.set(mode, opened.load_ms);
    ttft_ms.set(mode, time_to_first_token_ms(*opened.decoder, prompt));
  }
  const EnergyMeter energy;
  for (const std::string& mode : arguments.modes) {
    for (const int threads : arguments.threads) {
      fprintf(stderr, "%s, %d threads\n", mode.c_str(), threads);
      Opened opened = open(runtime, bundle, mode, threads);
      if (kernels != nullptr) kernels->reset_calls();
      for (Json& row : measure(*opened.decoder, protocol, prompt, mode, threads)) rows.add(std::move(row));
      if (mode == "native" && kernels != nullptr) variants = kernels->calls();
    }
  }
  report.set("checked_tokens", checked);
  report.set("rows", rows);
  report.set("ttft_ms", ttft_ms);
  report.set("load_ms", load_ms);
  report.set("peak_rss_bytes", peak_rss_bytes());
  report.set("density", configured_density(bundle.manifest));
  report.set("variants", variants);
  report.set("energy_joules", energy.joules());
  report.set("state_after", describe_state());
  return report;
}

int run(int argc, char** argv) {
  Arguments arguments = parse_arguments(argc, argv);
  if (arguments.help) {
    fputs(usage(), stdout);
    return 0;
  }
  const Bundle bundle = read_bundle(arguments.bundle);
  const std::string& kind = bundle.manifest.at("kind", "manifest.json").text("kind");
  if (kind != "decoder")
    throw std::runtime_error(arguments.bundle + " holds a " + kind + ", which generates no tokens");
  if (arguments.modes.empty()) {
    arguments.modes = {"bodies"};
    if (!bundle.library.empty()) arguments.modes = {"native", "bodies"};
  }
  for (int& threads : arguments.threads) {
    if (threads == 0) threads = static_cast<int>(std::thread::hardware_concurrency());
  }
  const OnnxRuntime runtime(arguments.onnxruntime);
  std::unique_ptr<KernelLibrary> kernels;
  if (arguments.modes.front() == "native" || arguments.modes.back() == "native") {
    if (!bundle.library.empty()) {
      kernels = std::make_unique<KernelLibrary>(bundle.library);
      fprintf(stderr, "kernels %s, variant %s\n", kernels->version().c_str(), kernels->chosen().c_str());
    }
  }
  const Json report = arguments.ids.empty() ? bench(arguments, runtime, bundle, kernels.get())
                                            : generate(arguments, runtime, bundle, kernels.get());
  printf("%s\n", report.to_string().c_str());
  return 0;
}

}  // namespace
}  // namespace qsparse_device

int main(int argc, char** argv) {
  try {
    return qsparse_device::run(argc, argv);
  } catch (const qsparse_device::UsageError& error) {
    fprintf(stderr, "qsparse-device-bench: %s\n%s", error.what(), qsparse_device::usage());
    return 2;
  } catch (const std::exception& error) {
    fprintf(stderr, "qsparse-device-bench: %s\n", error.what());
    return 1;
  }
}
