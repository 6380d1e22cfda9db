#include "machine.h"

#include <sched.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <thread>
#include <vector>

namespace qsparse_device {
namespace {

namespace fs = std::filesystem;

constexpr double kMicro = 1e-6;

std::string first_line(const fs::path& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  while (!line.empty() && (line.back() == '\0' || line.back() == ' ')) line.pop_back();
  return line;
}

bool read_number(const fs::path& path, double* value) {
  const std::string line = first_line(path);
  char* end = nullptr;
  *value = strtod(line.c_str(), &end);
  return end != line.c_str();
}

std::vector<fs::path> entries(const fs::path& folder, const std::string& prefix) {
  std::vector<fs::path> found;
  std::error_code ignored;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder, ignored)) {
    if (entry.path().filename().string().rfind(prefix, 0) == 0) found.push_back(entry.path());
  }
  std::sort(found.begin(), found.end());
  return found;
}

// The first value of each key of /proc/cpuinfo.
std::map<std::string, std::string> cpuinfo() {
  std::ifstream file("/proc/cpuinfo");
  std::map<std::string, std::string> values;
  for (std::string line; std::getline(file, line);) {
    const size_t colon = line.find(':');
    if (colon == std::string::npos) continue;
    std::string key = line.substr(0, colon);
    while (!key.empty() && (key.back() == '\t' || key.back() == ' ')) key.pop_back();
    values.emplace(key, colon + 2 <= line.size() ? line.substr(colon + 2) : "");
  }
  return values;
}

// Of the first core, bytes; 0 where the system does not tell.
int64_t last_level_cache_bytes() {
  double largest = 0, kib = 0;
  for (const fs::path& cache : entries("/sys/devices/system/cpu/cpu0/cache", "index")) {
    const std::string size = first_line(cache / "size");  // such as 512K
    if (read_number(cache / "size", &kib)) largest = std::max(largest, size.back() == 'M' ? kib * 1024 : kib);
  }
  return static_cast<int64_t>(largest * 1024);
}

Json text_or_null(const std::string& text) { return text.empty() ? Json() : Json(text); }

}  // namespace

Json describe_machine() {
  const std::map<std::string, std::string> info = cpuinfo();
  const auto value = [&](const char* key) { return info.count(key) ? info.at(key) : std::string(); };
  std::string cpu = value("model name");
  if (cpu.empty() && !value("CPU part").empty()) {  // 64-bit ARM names its cores by number
    cpu = "implementer " + value("CPU implementer") + " part " + value("CPU part");
  }
  Json features = Json::list();
  for (const std::string& name : cpu_features()) features.add(name);
  const int64_t cache_bytes = last_level_cache_bytes();
  utsname names{};
  uname(&names);
  Json machine = Json::object();
  machine.set("cpu", text_or_null(cpu));
  machine.set("board", text_or_null(first_line("/proc/device-tree/model")));
  machine.set("arch", names.machine);
  machine.set("system", std::string(names.sysname) + " " + names.release);
  machine.set("cores", static_cast<int64_t>(std::thread::hardware_concurrency()));
  machine.set("last_level_cache_bytes", cache_bytes > 0 ? Json(cache_bytes) : Json());
  machine.set("memory_bytes", static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE));
  machine.set("features", features);
  return machine;
}

std::vector<std::string> cpu_features() {
  const std::map<std::string, std::string> info = cpuinfo();
  std::vector<std::string> names;
  for (const char* key : {"flags", "Features"}) {
    std::istringstream words(info.count(key) ? info.at(key) : "");
    for (std::string word; words >> word;) names.push_back(word);
  }
  return names;
}

int usable_cores() {
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) return CPU_COUNT(&allowed);
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

Json describe_state() {
  Json frequencies = Json::list(), temperatures = Json::object(), state = Json::object();
  double value = 0;
  bool any_frequency = false, any_temperature = false;
  for (const fs::path& cpu : entries("/sys/devices/system/cpu", "cpu")) {
    if (!read_number(cpu / "cpufreq" / "scaling_cur_freq", &value)) continue;
    frequencies.add(value / 1000);  // kHz
    any_frequency = true;
  }
  for (const fs::path& zone : entries("/sys/class/thermal", "thermal_zone")) {
    if (!read_number(zone / "temp", &value)) continue;
    temperatures.set(zone.filename().string() + " " + first_line(zone / "type"), value / 1000);  // millidegrees
    any_temperature = true;
  }
  state.set("frequency_mhz", any_frequency ? frequencies : Json());
  state.set("temperature_celsius", any_temperature ? temperatures : Json());
  return state;
}

int64_t peak_rss_bytes() {
  std::ifstream file("/proc/self/status");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("VmHWM:", 0) == 0) return strtoll(line.c_str() + sizeof "VmHWM:" - 1, nullptr, 10) * 1024;
  }
  return 0;
}

EnergyMeter::EnergyMeter() {
  double value = 0;
  for (const fs::path& zone : entries("/sys/class/powercap", "intel-rapl:")) {
    if (!read_number(zone / "energy_uj", &value)) continue;
    double range = 0;
    if (!read_number(zone / "max_energy_range_uj", &range)) range = 0;
    counters_[zone.filename().string() + " " + first_line(zone / "name")] = {zone / "energy_uj", value, range};
  }
  for (const fs::path& sensor : entries("/sys/class/hwmon", "hwmon")) {
    for (const fs::path& counter : entries(sensor, "energy")) {
      const std::string file = counter.filename().string();
      if (file.size() < 6 || file.substr(file.size() - 6) != "_input" || !read_number(counter, &value)) continue;
      counters_[first_line(sensor / "name") + " " + file.substr(0, file.size() - 6)] = {counter, value, 0};
    }
  }
}

std::map<std::string, double> EnergyMeter::joules() const {
  std::map<std::string, double> spent;
  for (const auto& [name, counter] : counters_) {
    double now = 0;
    if (!read_number(counter.path, &now)) continue;
    if (now < counter.start_uj) now += counter.range_uj;
    if (now >= counter.start_uj) spent[name] = (now - counter.start_uj) * kMicro;
  }
  return spent;
}

}  // namespace qsparse_device
