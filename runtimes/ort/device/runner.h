// One opened model in a process of its own, as the process that measures sees it.
#ifndef QSPARSE_DEVICE_RUNNER_H_
#define QSPARSE_DEVICE_RUNNER_H_

#include <sys/types.h>

#include <cstdio>
#include <functional>
#include <stdexcept>
#include <string>

#include "json.h"

namespace qsparse_device {

// The tokens were wrong: nothing of this bundle may be timed.
class WrongTokensError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Runner {
 public:
  // Forks; the child calls `serve` with its ends of two pipes and exits with what that returns. Nothing may have
  // started a thread before. Throws std::runtime_error when the child could not open the model.
  explicit Runner(const std::function<int(FILE*, FILE*)>& serve);
  ~Runner();
  Runner(const Runner&) = delete;
  Runner& operator=(const Runner&) = delete;
  // What opening took: {"load_ms", "rss_before_load_bytes"}.
  const Json& opened() const { return opened_; }
  // The answer to a command. Throws std::runtime_error when the child fails or ends, WrongTokensError as named.
  Json ask(const std::string& command, const Json& value);

 private:
  Json read();
  void end();
  pid_t child_ = -1;
  FILE* commands_ = nullptr;
  FILE* answers_ = nullptr;
  Json opened_;
};

}  // namespace qsparse_device

#endif  // QSPARSE_DEVICE_RUNNER_H_
