// What the system tells of the machine: processor, features, frequency, temperature, energy. Linux's /proc and /sys;
// what cannot be read is null in the report.
#ifndef QSPARSE_DEVICE_MACHINE_H_
#define QSPARSE_DEVICE_MACHINE_H_

#include <cstdint>
#include <map>
#include <string>

#include "json.h"

namespace qsparse_device {

// {"cpu", "board", "arch", "system", "cores", "memory_bytes", "features"}
Json describe_machine();

// {"frequency_mhz": [of each core], "temperature_celsius": {sensor: degrees}} now
Json describe_state();

// Most memory that this process has held, bytes; 0 where the system does not tell.
int64_t peak_rss_bytes();

// Energy counters of the machine (RAPL packages; hwmon sensors that count joules), read at construction.
class EnergyMeter {
 public:
  EnergyMeter();
  // {counter: joules since construction}; null where the machine has no counter that this user may read.
  Json joules() const;

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
