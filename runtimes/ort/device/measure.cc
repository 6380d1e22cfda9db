#include "measure.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>

namespace qsparse_device {
namespace {

std::vector<int64_t> cycled(const std::vector<int64_t>& ids, int64_t count) {
  std::vector<int64_t> out;
  for (int64_t i = 0; i < count; ++i) out.push_back(ids[static_cast<size_t>(i) % ids.size()]);
  return out;
}

// The value below which `share` of the sorted values lie, between neighbours in proportion.
double percentile(const std::vector<double>& sorted, double share) {
  const double place = share * static_cast<double>(sorted.size() - 1);
  const auto below = static_cast<size_t>(place);
  const size_t above = std::min(below + 1, sorted.size() - 1);
  return sorted[below] + (sorted[above] - sorted[below]) * (place - static_cast<double>(below));
}

Repetition time_prompt(Decoder& decoder, const std::vector<int64_t>& prompt) {
  decoder.reset();
  const double start = now_s();
  decoder.step(prompt);
  return {{now_s() - start}, static_cast<int64_t>(prompt.size())};
}

Repetition time_generation(Decoder& decoder, int64_t first, int64_t count) {
  decoder.reset();
  Repetition run{{}, count};
  for (int64_t token = first; static_cast<int64_t>(run.call_s.size()) < count;) {
    const double start = now_s();
    token = decoder.step({token});
    run.call_s.push_back(now_s() - start);
  }
  return run;
}

}  // namespace

double now_s() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

Json summarise(const std::string& test, const std::string& mode, int threads, const std::vector<Repetition>& runs) {
  std::vector<double> speeds, calls_ms;
  for (const Repetition& run : runs) {
    speeds.push_back(static_cast<double>(run.tokens) / std::accumulate(run.call_s.begin(), run.call_s.end(), 0.0));
    for (const double seconds : run.call_s) calls_ms.push_back(seconds * 1000);
  }
  std::sort(calls_ms.begin(), calls_ms.end());
  const double mean = std::accumulate(speeds.begin(), speeds.end(), 0.0) / static_cast<double>(speeds.size());
  double squares = 0;
  for (const double speed : speeds) squares += (speed - mean) * (speed - mean);
  const double deviation = speeds.size() > 1 ? std::sqrt(squares / static_cast<double>(speeds.size() - 1)) : 0;
  Json row = Json::object();
  row.set("test", test);
  row.set("mode", mode);
  row.set("threads", threads);
  row.set("tokens_per_s_mean", mean);
  row.set("tokens_per_s_std", deviation);
  row.set("p50_ms", percentile(calls_ms, 0.5));
  row.set("p90_ms", percentile(calls_ms, 0.9));
  return row;
}

std::vector<Json> measure(Decoder& decoder, const Protocol& protocol, const std::vector<int64_t>& prompt,
                          const std::string& mode, int threads) {
  std::vector<Json> rows;
  const std::vector<int64_t> long_prompt = cycled(prompt, protocol.prompt_tokens);
  const auto repeat = [&](const std::string& test, auto run) {
    run();  // the first one pays for memory that the others find there
    std::vector<Repetition> runs;
    for (int64_t i = 0; i < protocol.repetitions; ++i) runs.push_back(run());
    rows.push_back(summarise(test, mode, threads, runs));
  };
  if (protocol.prompt_tokens > 0) {
    repeat("pp" + std::to_string(protocol.prompt_tokens), [&] { return time_prompt(decoder, long_prompt); });
  }
  if (protocol.generate_tokens > 0) {
    repeat("tg" + std::to_string(protocol.generate_tokens),
           [&] { return time_generation(decoder, prompt.front(), protocol.generate_tokens); });
  }
  return rows;
}

double time_to_first_token_ms(Decoder& decoder, const std::vector<int64_t>& prompt) {
  decoder.reset();
  const double start = now_s();
  decoder.step(prompt);
  return (now_s() - start) * 1000;
}

}  // namespace qsparse_device
