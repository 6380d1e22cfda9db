// The command line of qsparse-device-bench.
#ifndef QSPARSE_DEVICE_ARGUMENTS_H_
#define QSPARSE_DEVICE_ARGUMENTS_H_

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace qsparse_device {

struct Arguments {
  std::string bundle;
  std::string onnxruntime;  // path; empty: the system's own
  std::string device;       // what reports call this machine; empty: its processor
  std::string session;      // a mode: serve one opened model on stdin and stdout and measure nothing
  std::vector<int> threads = {0};
  std::vector<std::string> modes;  // empty: native and bodies, as far as the bundle has them
  std::vector<int64_t> prompt_tokens = {512};
  std::vector<int64_t> generate_tokens = {128};
  int64_t repetitions = 5;
  std::vector<int64_t> ids;  // given: generate from these and measure nothing
  bool unchecked = false;
  bool help = false;
};

// A wrong command line; exit code 2.
class UsageError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

Arguments parse_arguments(int argc, char** argv);
const char* usage();

}  // namespace qsparse_device

#endif  // QSPARSE_DEVICE_ARGUMENTS_H_
