#include "bundle.h"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <stdexcept>

namespace qsparse_device {
namespace {

constexpr int64_t kStride = 7919;  // a prime: neighbours in the prompt are no neighbours in the vocabulary
constexpr char kDense[] = "dense.onnx";

const Json& null_value() {
  static const Json null;
  return null;
}

}  // namespace

std::string Bundle::graph(const std::string& mode) const {
  if (mode == "native" && library.empty()) {
    throw std::runtime_error(folder + " has no kernel library: it runs with --modes bodies only");
  }
  if (mode != "dense") return folder + "/model.onnx";
  if (!std::ifstream(folder + "/" + kDense)) {
    throw std::runtime_error(folder + " has no " + kDense + ", which the mode dense runs: export with --with-bench");
  }
  return folder + "/" + kDense;
}

const Json& Bundle::recorded(const std::string& mode) const {
  const Json& parity = manifest.at("parity", "manifest.json");
  if (parity.is_null()) return null_value();
  for (const Json& path : parity.at("paths", "parity").items("parity.paths")) {
    if (path.at("path", "parity.paths").text("parity.paths.path") == mode) return path;
  }
  return null_value();
}

std::vector<int64_t> Bundle::recorded_prompt() const {
  const Json& parity = manifest.at("parity", "manifest.json");
  if (parity.is_null()) return {};
  const Json& ids = parity.at("prompt_ids", "parity");
  return ids.is_null() ? std::vector<int64_t>() : ids.integers("parity.prompt_ids");
}

const Json& Bundle::activity(const std::string& mode) const {
  const Json& bench = manifest.at("bench", "manifest.json");
  if (bench.is_null()) return null_value();
  return bench.at(mode == "dense" ? "dense" : "sparse", "bench");
}

int64_t Bundle::vocabulary() const {
  const double size = manifest.at("model", "manifest.json").at("vocab_size", "model").number("model.vocab_size");
  if (!(size >= 1 && size < 1e9)) throw std::runtime_error("manifest.json: the model's vocab_size is no such number");
  return static_cast<int64_t>(size);
}

int64_t Bundle::most_positions() const {
  const Json& model = manifest.at("model", "manifest.json");
  return static_cast<int64_t>(model.at("max_positions", "model").number("model.max_positions"));
}

int64_t Bundle::first_token() const {
  const Json& begin = manifest.at("model", "manifest.json").at("bos_token_id", "model");
  return begin.is_null() ? 1 % vocabulary() : static_cast<int64_t>(begin.number("model.bos_token_id"));
}

std::string Bundle::lacking(const std::vector<std::string>& features) const {
  std::string lacks;
  const Json& target = manifest.at("target", "manifest.json");
  for (const Json& feature : target.at("features", "target").items("target.features")) {
    const std::string& name = feature.text("target.features");
    if (std::find(features.begin(), features.end(), name) != features.end()) continue;
    lacks += (lacks.empty() ? "" : " ") + name;
  }
  return lacks;
}

Bundle read_bundle(const std::string& folder) {
  std::ifstream file(folder + "/manifest.json", std::ios::binary);
  if (!file) throw std::runtime_error(folder + " is no bundle: it has no manifest.json");
  const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  Bundle bundle{folder, Json::parse(text), ""};
  for (const auto& [name, entry] : bundle.manifest.at("files", "manifest.json").members("files")) {
    if (name.size() > 3 && name.substr(name.size() - 3) == ".so") bundle.library = folder + "/" + name;
  }
  const std::string& kind = bundle.manifest.at("kind", "manifest.json").text("kind");
  if (kind != "decoder") throw std::runtime_error(folder + " holds a " + kind + ", which generates no tokens");
  return bundle;
}

std::vector<int64_t> prompt_ids(int64_t vocabulary, int64_t tokens) {
  std::vector<int64_t> ids;
  for (int64_t i = 0; i < tokens; ++i) ids.push_back((kStride * i + 1) % vocabulary);
  return ids;
}

}  // namespace qsparse_device
