// qsparse-device-bench: checks and times a bundle on the machine that it was made for, without Python.
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "arguments.h"
#include "bundle.h"
#include "machine.h"
#include "measure.h"
#include "report.h"
#include "runner.h"
#include "session_process.h"

namespace qsparse_device {
namespace {

std::unique_ptr<Runner> start(const Arguments& arguments, const Bundle& bundle, const Way& way) {
  return std::make_unique<Runner>(
      [&](FILE* commands, FILE* answers) { return serve(arguments, bundle, way, commands, answers); });
}

// Every mode generates the recorded tokens, in a process that ends before anything is timed. WrongTokensError when one
// of them generates others. What fails otherwise is noted and left out of `modes`.
Checked check(const Arguments& arguments, const Bundle& bundle, std::vector<std::string>* modes,
              const std::function<void(const std::string&)>& tell, Findings* findings) {
  Checked checked;
  std::vector<std::string> good;
  for (const std::string& mode : *modes) {
    tell("check " + mode);
    try {
      const Json answer = start(arguments, bundle, {mode, arguments.threads.front()})->ask("check", true);
      checked.tokens.set(mode, answer.at("checked_tokens", "a check"));
      if (checked.runtime.is_null() || bundle.runs_kernels(mode)) checked.runtime = answer;
      good.push_back(mode);
    } catch (const WrongTokensError&) {
      throw;
    } catch (const std::exception& error) {
      findings->failed.push_back(failure(mode, 0, error.what()));
      if (modes->size() == 1) throw;  // there is nothing else to report
    }
  }
  if (good.empty()) throw std::runtime_error(findings->failed.front().at("reason", "a failure").text("reason"));
  *modes = good;
  return checked;
}

Findings bench(const Arguments& arguments, const Bundle& bundle) {
  const Protocol protocol = protocol_of(arguments.prompt_tokens, arguments.generate_tokens, arguments.repetitions);
  std::vector<std::string> modes = arguments.modes;
  const size_t rounds = protocol.tests.size() * static_cast<size_t>(arguments.repetitions + 1);
  const size_t steps = modes.size() * (1 + rounds * arguments.threads.size());
  size_t step = 0;
  const auto tell = [&](const std::string& what) { fprintf(stderr, "[%zu/%zu] %s\n", ++step, steps, what.c_str()); };
  Findings findings;
  const Checked checked = check(arguments, bundle, &modes, tell, &findings);
  const Json state_before = describe_state();
  for (const int threads : arguments.threads) {
    std::vector<std::pair<std::string, std::unique_ptr<Runner>>> runners;
    for (const std::string& mode : modes) {
      try {
        runners.emplace_back(mode, start(arguments, bundle, {mode, threads}));
      } catch (const std::exception& error) {
        findings.failed.push_back(failure(mode, threads, error.what()));
      }
    }
    take_turns(std::move(runners), protocol, threads, tell, &findings);
  }
  printf("%s\n", report(arguments, bundle, checked, state_before, findings).to_string().c_str());
  return findings;
}

// Tokens after given ids, and the calls of kernels that they took: for tests, which count instructions too.
void generate(const Arguments& arguments, const Bundle& bundle) {
  const std::string& mode = arguments.modes.front();
  Opened opened = open(arguments, bundle, {mode, arguments.threads.front()});
  Json made = Json::object();
  made.set("mode", mode);
  made.set("tokens", Json(opened.decoder->generate(arguments.ids, arguments.generate_tokens.front())));
  made.set("native_calls", opened.kernels ? opened.kernels->calls() : Json::object());
  made.set("onnxruntime", opened.runtime->version());
  printf("%s\n", made.to_string().c_str());
}

// UsageError for more tokens than the model has positions, or none.
void require_possible(const Arguments& arguments, const Bundle& bundle) {
  bool any = false;
  for (const auto* counts : {&arguments.prompt_tokens, &arguments.generate_tokens}) {
    for (const int64_t tokens : *counts) {
      any |= tokens > 0;
      if (tokens > bundle.most_positions()) {
        throw UsageError(std::to_string(tokens) + " tokens; the model has " + std::to_string(bundle.most_positions()) +
                         " positions (-p, -n)");
      }
    }
  }
  if (!any) throw UsageError("nothing to measure: -p 0 and -n 0");
}

// Throws std::runtime_error when `mode` runs kernels that were made for another processor.
void require_features(const Bundle& bundle, const std::string& mode) {
  if (!bundle.runs_kernels(mode)) return;
  const std::string lacks = bundle.lacking(cpu_features());
  if (lacks.empty()) return;
  const std::string& target = bundle.manifest.at("target", "manifest.json").at("name", "target").text("target.name");
  throw std::runtime_error(bundle.folder + " was made for " + target + ", and this processor lacks " + lacks +
                           ": export it with another --target, or run the function bodies with --modes bodies");
}

int run(int argc, char** argv) {
  Arguments arguments = parse_arguments(argc, argv);
  if (arguments.help) {
    fputs(usage(), stdout);
    return 0;
  }
  const Bundle bundle = read_bundle(arguments.bundle);
  if (!arguments.session.empty()) arguments.modes = {arguments.session};
  if (arguments.modes.empty()) {
    arguments.modes = {"bodies"};
    if (!bundle.library.empty()) arguments.modes = {"native", "bodies"};
  }
  for (const std::string& mode : arguments.modes) {
    require_features(bundle, mode);
    bundle.graph(mode);
  }
  for (int& threads : arguments.threads) {
    if (threads == 0) threads = usable_cores();
  }
  if (!arguments.session.empty()) {
    FILE* answers = fdopen(dup(STDOUT_FILENO), "w");
    dup2(STDERR_FILENO, STDOUT_FILENO);  // whatever a library prints must not get between the answers
    return serve(arguments, bundle, {arguments.session, arguments.threads.front()}, stdin, answers);
  }
  if (!arguments.ids.empty()) {
    generate(arguments, bundle);
    return 0;
  }
  require_possible(arguments, bundle);
  const Findings findings = bench(arguments, bundle);
  for (const Json& failed : findings.failed) {
    fprintf(stderr, "qsparse-device-bench: failed: %s\n", failed.to_string().c_str());
  }
  return findings.failed.empty() ? 0 : 1;
}

}  // namespace
}  // namespace qsparse_device

int main(int argc, char** argv) {
  signal(SIGPIPE, SIG_IGN);  // writing to a process that ended fails then, and what it said last can be read
  try {
    return qsparse_device::run(argc, argv);
  } catch (const qsparse_device::UsageError& error) {
    fprintf(stderr, "qsparse-device-bench: %s\n%s", error.what(), qsparse_device::usage());
    return 2;
  } catch (const std::exception& error) {
    fprintf(stderr, "qsparse-device-bench: %s\n", error.what());
    return 1;
  }
}
