// What the system tells of the machine: processor, features, frequency, temperature, energy. Linux's /proc and /sys;
// what cannot be read is null in the report.
#ifndef QSPARSE_DEVICE_MACHINE_H_
#define QSPARSE_DEVICE_MACHINE_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "json.h"

namespace qsparse_device {

// {"cpu", "board", "arch", "system", "cores", "last_level_cache_bytes", "memory_bytes", "features"}
Json describe_machine();

// What the processor can, by Linux's names.
std::vector<std::string> cpu_features();

// Cores that this process may use.
int usable_cores();

// {"frequency_mhz": [of each core], "temperature_celsius": {sensor: degrees}} now
Json describe_state();

// Most memory that this process had resident at once, bytes, file-mapped weights included; 0 where the system does not
// tell. Linux's VmHWM: getrusage would count the process that started this one.
int64_t peak_rss_bytes();

// Energy counters of the machine (RAPL packages; hwmon sensors that count joules), read at construction.
class EnergyMeter {
 public:
  EnergyMeter();
  // Counter to joules since construction; empty where the machine has no counter that this user may read.
  std::map<std::string, double> joules() const;

 private:
  struct Counter {
    std::string path;
    double start_uj;
    double range_uj;  // the counter wraps here; 0: it does not
  };
  std::map<std::string, Counter> counters_;
};

}  // namespace qsparse_device

#endif  // QSPARSE_DEVICE_MACHINE_H_
