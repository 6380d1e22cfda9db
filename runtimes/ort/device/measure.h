// Times several opened models in turn, so that a machine that slows down does so for all of them: the loop and the
// statistics of qsparse_export/bench/turns.py and measurement.py.
#ifndef QSPARSE_DEVICE_MEASURE_H_
#define QSPARSE_DEVICE_MEASURE_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "json.h"
#include "runner.h"

namespace qsparse_device {

// The tests, as names (pp512, tg128) and tokens, each repeated after one run that does not count.
struct Protocol {
  std::vector<std::pair<std::string, int64_t>> tests;
  int64_t repetitions;
};

Protocol protocol_of(const std::vector<int64_t>& prompts, const std::vector<int64_t>& generations, int64_t repetitions);

// What was found: `rows`, `sessions`, `energy` and `failed` as docs/benchmarks.md describes them.
struct Findings {
  std::vector<Json> rows, sessions, energy, failed;
};

// {"mode", "threads", "reason"}: `threads` 0 stands for all numbers of them, and is null.
Json failure(const std::string& mode, int threads, const std::string& reason);

// Runs every test on every runner in turn and adds what it finds. A runner that fails is ended and named in `failed`,
// and the others go on. `tell` hears what runs next.
void take_turns(std::vector<std::pair<std::string, std::unique_ptr<Runner>>> runners, const Protocol& protocol,
                int threads, const std::function<void(const std::string&)>& tell, Findings* findings);

// One row of seconds per repetition: each of them one number per token, or one for a whole prompt of `tokens`.
// {"test", "mode", "threads", "tokens_per_s_mean", "tokens_per_s_std", "p50_ms", "p90_ms", "samples_tokens_per_s"}:
// mean and sample deviation over repetitions; percentiles over numbers.
Json summarise(const std::string& test, const std::string& mode, int threads, int64_t tokens,
               const std::vector<std::vector<double>>& repetitions_s);

// Seconds of a clock that never goes back.
double now_s();

}  // namespace qsparse_device

#endif  // QSPARSE_DEVICE_MEASURE_H_
