// The measured side: a process that opens one model and does what it is told, one line of JSON after the other. It is
// the protocol of qsparse_export/bench/session_process.py, and one command more: check.
#ifndef QSPARSE_DEVICE_SESSION_PROCESS_H_
#define QSPARSE_DEVICE_SESSION_PROCESS_H_

#include <cstdio>
#include <memory>
#include <string>

#include "arguments.h"
#include "bundle.h"
#include "decoder.h"
#include "kernel_library.h"
#include "onnxruntime.h"

namespace qsparse_device {

// How a bundle is opened.
struct Way {
  std::string mode;
  int threads;
};

// A bundle that was opened, with what runs it. Members are destroyed from the last to the first.
struct Opened {
  std::unique_ptr<OnnxRuntime> runtime;
  std::unique_ptr<KernelLibrary> kernels;  // null: function bodies run
  std::unique_ptr<Session> session;
  std::unique_ptr<Decoder> decoder;
  double load_ms;                 // files to a model ready to run
  int64_t rss_before_load_bytes;  // peak until then, libraries included
};

Opened open(const Arguments& arguments, const Bundle& bundle, const Way& way);

// The kind of an error line that no other mode can make up for: other tokens than were recorded, or none to check.
inline constexpr char kWrongTokens[] = "wrong tokens";

// Opens the bundle, says what that took, and answers every line of `commands` on `answers` until there are no more:
//   {"prefill": N}        {"seconds", "first_token_seconds"}
//   {"generate": N}       {"seconds_per_token": [...]}
//   {"footprint": true}   {"peak_rss_bytes", "native_calls"}
//   {"check": true}       {"checked_tokens", "onnxruntime", "library", "supported_variants"}: see check_tokens
// What fails is a line too, {"error", "kind"}, and the last one. Returns the exit code.
int serve(const Arguments& arguments, const Bundle& bundle, const Way& way, FILE* commands, FILE* answers);

}  // namespace qsparse_device

#endif  // QSPARSE_DEVICE_SESSION_PROCESS_H_
