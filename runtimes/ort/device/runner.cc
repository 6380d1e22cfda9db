#include "runner.h"

#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <cstring>

#include "session_process.h"

namespace qsparse_device {
namespace {

std::string cause(int status) {
  if (!WIFSIGNALED(status)) return "with exit code " + std::to_string(WEXITSTATUS(status));
  const int number = WTERMSIG(status);
  return "by signal " + std::to_string(number) + (number == SIGKILL ? ", as a system short of memory ends one" : "");
}

}  // namespace

Runner::Runner(const std::function<int(FILE*, FILE*)>& serve) {
  int to_child[2], from_child[2];
  // Close-on-exec does nothing here, where nothing is executed: a later child must not hold this one's commands open,
  // and closes them itself by ending with its parent.
  if (pipe(to_child) != 0 || pipe(from_child) != 0)
    throw std::runtime_error("no pipe: " + std::string(strerror(errno)));
  fflush(nullptr);
  const pid_t parent = getpid();
  child_ = fork();
  if (child_ < 0) throw std::runtime_error("cannot start a process: " + std::string(strerror(errno)));
  if (child_ == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);  // it must not go on computing for a parent that was ended
    if (getppid() != parent) _exit(1);
    close(to_child[1]);
    close(from_child[0]);
    dup2(STDERR_FILENO, STDOUT_FILENO);  // whatever a library prints is no part of the report
    _exit(serve(fdopen(to_child[0], "r"), fdopen(from_child[1], "w")));
  }
  close(to_child[0]);
  close(from_child[1]);
  commands_ = fdopen(to_child[1], "w");
  answers_ = fdopen(from_child[0], "r");
  try {
    opened_ = read();
  } catch (...) {
    end();
    throw;
  }
}

Runner::~Runner() { end(); }

void Runner::end() {
  // Killed, not asked: children that were started later hold copies of the pipe, so that it does not end for this one.
  if (child_ > 0) {
    kill(child_, SIGKILL);
    waitpid(child_, nullptr, 0);
  }
  child_ = -1;
  if (commands_ != nullptr) fclose(commands_);
  if (answers_ != nullptr) fclose(answers_);
  commands_ = answers_ = nullptr;
}

Json Runner::ask(const std::string& command, const Json& value) {
  if (child_ < 0) throw std::runtime_error("the process has ended");
  Json line = Json::object();
  line.set(command, value);
  fprintf(commands_, "%s\n", line.to_string().c_str());
  fflush(commands_);  // to one that ended it fails, and reading says why
  return read();
}

Json Runner::read() {
  std::string line;
  int c = getc(answers_);
  for (; c != EOF && c != '\n'; c = getc(answers_)) line += static_cast<char>(c);
  if (c == EOF) {
    int status = 0;
    waitpid(child_, &status, 0);
    child_ = -1;
    throw std::runtime_error("the process that ran the model ended " + cause(status));
  }
  Json answer = Json::parse(line);
  const Json& error = answer.at("error", "an answer");
  if (error.is_null()) return answer;
  const std::string& kind = answer.at("kind", "an answer").text("kind");
  if (kind == kWrongTokens) throw WrongTokensError(error.text("error"));
  throw std::runtime_error(error.text("error"));
}

}  // namespace qsparse_device
