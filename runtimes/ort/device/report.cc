#include "report.h"

#include <algorithm>
#include <set>

#include "machine.h"

namespace qsparse_device {
namespace {

Json list_of(const std::vector<Json>& items) {
  Json made = Json::list();
  for (const Json& item : items) made.add(item);
  return made;
}

Json names(const std::set<std::string>& all) {
  Json made = Json::list();
  for (const std::string& name : all) made.add(name);
  return made;
}

std::set<std::string> texts(const Json& list, const char* what) {
  std::set<std::string> all;
  for (const Json& item : list.items(what)) all.insert(item.text(what));
  return all;
}

std::string mode_of(const Json& session) { return session.at("mode", "a session").text("mode"); }

Json model(const Bundle& bundle) {
  const Json& manifest = bundle.manifest;
  const Json& config = manifest.at("model", "manifest.json");
  double bytes = 0;
  for (const auto& [name, file] : manifest.at("files", "manifest.json").members("files")) {
    if (name.rfind("model.onnx", 0) == 0) bytes += file.at("bytes", "files").number("files.bytes");
  }
  Json made = Json::object();
  made.set("name", manifest.at("name", "manifest.json"));
  made.set("target", manifest.at("target", "manifest.json").at("name", "target"));
  for (const char* key : {"runtime", "native", "weights", "dtype"}) made.set(key, manifest.at(key, "manifest.json"));
  for (const char* key : {"quantization", "layers"}) made.set(key, config.at(key, "model"));
  made.set("graph_and_weight_bytes", bytes);
  made.set("qsparse_export", manifest.at("qsparse_export", "manifest.json"));
  return made;
}

Json machine(const Arguments& arguments, const Checked& checked) {
  Json made = Json::object();
  if (!arguments.device.empty()) made.set("device", arguments.device);
  const Json described = describe_machine();
  for (const auto& [key, value] : described.members("machine")) made.set(key, value);
  for (const char* key : {"supported_variants", "library", "onnxruntime"}) {
    made.set(key, checked.runtime.at(key, "a check"));
  }
  return made;
}

// How active the channels are was measured at export, on the same tokens; where function bodies run in place of kernels
// that skip, what is read is up to the runtime, which rewrites them.
Json activity(const Bundle& bundle, const std::string& mode, const std::vector<Json>& sessions) {
  std::set<std::string> used;
  for (const Json& session : sessions) {
    if (mode_of(session) != mode) continue;
    for (const auto& [op, calls] : session.at("variants", "a session").members("variants")) used.insert(op);
  }
  const Json& record = bundle.activity(mode);
  Json made = Json::object();
  made.set("mode", mode);
  if (record.is_null()) {
    made.set("tokens", 0);
    for (const char* key : {"bytes_per_token", "mean_density"}) made.set(key, Json());
    made.set("density", Json::object());
    made.set("not_native", Json::list());
    made.set("source", "not measured: the bundle was exported without --with-bench");
    return made;
  }
  const std::set<std::string> skipping = texts(record.at("skipping_ops", "bench"), "bench.skipping_ops");
  const bool is_known = std::includes(used.begin(), used.end(), skipping.begin(), skipping.end());
  std::set<std::string> not_native;
  if (bundle.runs_kernels(mode)) {
    for (const std::string& op : texts(record.at("ops", "bench"), "bench.ops")) {
      if (used.count(op) == 0) not_native.insert(op);
    }
  }
  made.set("tokens", record.at("tokens", "bench"));
  made.set("bytes_per_token", is_known ? record.at("bytes_per_token", "bench") : Json());
  made.set("mean_density", record.at("mean_density", "bench"));
  made.set("density", record.at("density", "bench"));
  made.set("not_native", names(not_native));
  made.set("source", "measured at export");
  return made;
}

}  // namespace

Json report(const Arguments& arguments, const Bundle& bundle, const Checked& checked, const Json& state_before,
            const Findings& findings) {
  std::vector<Json> activities;
  std::set<std::string> known;
  const Json* headline = nullptr;  // the first mode on the most threads
  for (const Json& session : findings.sessions) {
    const std::string mode = mode_of(session);
    if (known.insert(mode).second) activities.push_back(activity(bundle, mode, findings.sessions));
    const auto threads = [](const Json& of) { return of.at("threads", "a session").number("threads"); };
    if (headline == nullptr || (mode == mode_of(*headline) && threads(session) > threads(*headline))) {
      headline = &session;
    }
  }
  Json made = Json::object();
  made.set("rows", list_of(findings.rows));
  for (const char* key : {"ttft_ms", "load_ms", "peak_rss_bytes"}) {
    made.set(key, headline ? headline->at(key, "a session") : Json());
  }
  made.set("bytes_per_token", headline ? activities.front().at("bytes_per_token", "an activity") : Json());
  made.set("density", headline ? activities.front().at("density", "an activity") : Json::object());
  made.set("variants", headline ? headline->at("variants", "a session") : Json::object());
  made.set("model", model(bundle));
  made.set("machine", machine(arguments, checked));
  made.set("repetitions", arguments.repetitions);
  made.set("sessions", list_of(findings.sessions));
  made.set("activities", list_of(activities));
  made.set("failed", list_of(findings.failed));
  made.set("program", "qsparse-device-bench " QSPARSE_VERSION);
  made.set("checked_tokens", checked.tokens);
  made.set("state_before", state_before);
  made.set("state_after", describe_state());
  made.set("energy", findings.energy.empty() ? Json() : list_of(findings.energy));
  return made;
}

}  // namespace qsparse_device
