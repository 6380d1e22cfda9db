#include "measure.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>

#include "machine.h"

namespace qsparse_device {
namespace {

// Seconds of one mode: of its first prompt, of each later one's first token, of every test's repetitions; and joules.
struct Samples {
  double first_run_s = -1;
  std::vector<double> first_token_s;
  std::map<std::string, std::vector<std::vector<double>>> tests_s;
  std::map<std::string, std::map<std::string, double>> tests_joules;
};

struct Contender {
  std::string mode;
  std::unique_ptr<Runner> runner;  // null once it failed
  Samples samples;
};

// The value below which `share` of the values lie, between neighbours in proportion.
double percentile(std::vector<double> values, double share) {
  std::sort(values.begin(), values.end());
  const double place = share * static_cast<double>(values.size() - 1);
  const auto below = static_cast<size_t>(place);
  const size_t above = std::min(below + 1, values.size() - 1);
  return values[below] + (values[above] - values[below]) * (place - static_cast<double>(below));
}

std::vector<double> numbers(const Json& list, const char* what) {
  std::vector<double> values;
  for (const Json& item : list.items(what)) values.push_back(item.number(what));
  return values;
}

void run(Contender& contender, const std::string& test, int64_t tokens, bool is_longest_prompt, bool counts) {
  Samples& samples = contender.samples;
  const EnergyMeter meter;
  std::vector<double> seconds;
  if (test[0] == 't') {
    seconds = numbers(contender.runner->ask("generate", tokens).at("seconds_per_token", "an answer"), "seconds");
  } else {
    const Json answer = contender.runner->ask("prefill", tokens);
    seconds = {answer.at("seconds", "an answer").number("seconds")};
    const double first_token_s = answer.at("first_token_seconds", "an answer").number("first_token_seconds");
    if (samples.first_run_s < 0) samples.first_run_s = first_token_s;
    if (counts && is_longest_prompt) samples.first_token_s.push_back(first_token_s);
  }
  if (!counts) return;
  for (const auto& [counter, joules] : meter.joules()) samples.tests_joules[test][counter] += joules;
  samples.tests_s[test].push_back(std::move(seconds));
}

Json cost(Contender& contender, int threads) {
  const Samples& samples = contender.samples;
  const Json& opened = contender.runner->opened();
  const Json footprint = contender.runner->ask("footprint", true);
  const bool has_prompt = !samples.first_token_s.empty();
  Json session = Json::object();
  session.set("mode", contender.mode);
  session.set("threads", threads);
  session.set("load_ms", opened.at("load_ms", "an answer"));
  session.set("first_run_ms", samples.first_run_s < 0 ? Json() : Json(samples.first_run_s * 1e3));
  session.set("ttft_ms", has_prompt ? Json(percentile(samples.first_token_s, 0.5) * 1e3) : Json());
  session.set("peak_rss_bytes", footprint.at("peak_rss_bytes", "an answer"));
  session.set("rss_before_load_bytes", opened.at("rss_before_load_bytes", "an answer"));
  session.set("variants", footprint.at("native_calls", "an answer"));
  return session;
}

Json energy(const std::string& test, const std::string& mode, int threads, const std::map<std::string, double>& joules,
            double tokens) {
  Json per_token = Json::object(), row = Json::object();
  for (const auto& [counter, spent] : joules) per_token.set(counter, spent / tokens);
  row.set("test", test);
  row.set("mode", mode);
  row.set("threads", threads);
  row.set("joules_per_token", per_token);
  return row;
}

}  // namespace

double now_s() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

Protocol protocol_of(const std::vector<int64_t>& prompts, const std::vector<int64_t>& generations,
                     int64_t repetitions) {
  Protocol made{{}, repetitions};
  for (const int64_t tokens : prompts) {
    if (tokens > 0) made.tests.emplace_back("pp" + std::to_string(tokens), tokens);
  }
  for (const int64_t tokens : generations) {
    if (tokens > 0) made.tests.emplace_back("tg" + std::to_string(tokens), tokens);
  }
  return made;
}

Json failure(const std::string& mode, int threads, const std::string& reason) {
  Json failed = Json::object();
  failed.set("mode", mode);
  failed.set("threads", threads > 0 ? Json(threads) : Json());
  failed.set("reason", reason);
  return failed;
}

Json summarise(const std::string& test, const std::string& mode, int threads, int64_t tokens,
               const std::vector<std::vector<double>>& repetitions_s) {
  Json samples = Json::list();
  std::vector<double> speeds, calls_ms;
  for (const std::vector<double>& seconds : repetitions_s) {
    speeds.push_back(static_cast<double>(tokens) / std::accumulate(seconds.begin(), seconds.end(), 0.0));
    samples.add(speeds.back());
    for (const double value : seconds) calls_ms.push_back(value * 1e3);
  }
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
  row.set("samples_tokens_per_s", samples);
  return row;
}

void take_turns(std::vector<std::pair<std::string, std::unique_ptr<Runner>>> runners, const Protocol& protocol,
                int threads, const std::function<void(const std::string&)>& tell, Findings* findings) {
  std::vector<Contender> contenders;
  for (auto& [mode, runner] : runners) contenders.push_back({mode, std::move(runner), {}});
  const auto attempt = [&](Contender& contender, auto call) {
    if (contender.runner == nullptr) return;
    try {
      call();
    } catch (const std::exception& error) {
      findings->failed.push_back(failure(contender.mode, threads, error.what()));
      contender.runner.reset();
    }
  };
  int64_t longest = 0;
  for (const auto& [test, tokens] : protocol.tests) longest = test[0] == 'p' ? std::max(longest, tokens) : longest;
  for (int64_t turn = 0; turn <= protocol.repetitions; ++turn) {
    for (const auto& [test, tokens] : protocol.tests) {
      for (Contender& contender : contenders) {
        tell(test + " " + contender.mode + " t" + std::to_string(threads));
        attempt(contender,
                [&, &test = test, &tokens = tokens] { run(contender, test, tokens, tokens == longest, turn > 0); });
      }
    }
  }
  for (Contender& contender : contenders) {
    attempt(contender, [&] { findings->sessions.push_back(cost(contender, threads)); });
  }
  for (const auto& [test, tokens] : protocol.tests) {
    for (const Contender& contender : contenders) {
      if (contender.runner == nullptr) continue;  // half of a measurement is none
      const Samples& samples = contender.samples;
      findings->rows.push_back(summarise(test, contender.mode, threads, tokens, samples.tests_s.at(test)));
      const auto joules = samples.tests_joules.find(test);
      if (joules == samples.tests_joules.end()) continue;
      const double all_tokens = static_cast<double>(tokens * protocol.repetitions);
      findings->energy.push_back(energy(test, contender.mode, threads, joules->second, all_tokens));
    }
  }
}

}  // namespace qsparse_device
