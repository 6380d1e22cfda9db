// One test of the benchmark: a prompt of N tokens, or N tokens one by one, repeated.
#ifndef QSPARSE_DEVICE_MEASURE_H_
#define QSPARSE_DEVICE_MEASURE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "decoder.h"
#include "json.h"

namespace qsparse_device {

struct Protocol {
  int64_t prompt_tokens;    // pp: tokens of one prompt; 0: leave the test out
  int64_t generate_tokens;  // tg: tokens one by one; 0: leave the test out
  int64_t repetitions;      // after one that is not counted
};

// How one repetition of `test` went: seconds of each call of the decoder, `tokens` in all of them together.
struct Repetition {
  std::vector<double> call_s;
  int64_t tokens;
};

// {"test", "mode", "threads", "tokens_per_s_mean", "tokens_per_s_std", "p50_ms", "p90_ms"}: mean and sample deviation
// over repetitions; percentiles over calls, so of a whole prompt in pp and of one token in tg.
Json summarise(const std::string& test, const std::string& mode, int threads, const std::vector<Repetition>& runs);

// Runs the tests of `protocol`, with ids that cycle through `prompt`; one row each.
std::vector<Json> measure(Decoder& decoder, const Protocol& protocol, const std::vector<int64_t>& prompt,
                          const std::string& mode, int threads);

// Milliseconds from the prompt to its first token, from an empty cache.
double time_to_first_token_ms(Decoder& decoder, const std::vector<int64_t>& prompt);

// Seconds of a clock that never goes back.
double now_s();

}  // namespace qsparse_device

#endif  // QSPARSE_DEVICE_MEASURE_H_
