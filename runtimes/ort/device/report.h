// The report as one JSON document: the form of `qsparse-bench -o json` (qsparse_export/bench/measurement.py), and what
// only a program on the device can tell.
#ifndef QSPARSE_DEVICE_REPORT_H_
#define QSPARSE_DEVICE_REPORT_H_

#include <string>
#include <vector>

#include "arguments.h"
#include "bundle.h"
#include "measure.h"

namespace qsparse_device {

// What the checks of all modes found: how many tokens agree, and which runtime and kernels ran.
struct Checked {
  Json tokens = Json::object();  // {mode: what check_tokens returned}
  Json runtime;                  // the answer to the first check; with kernels where one ran them
};

// `state_before`: describe_state() before anything was timed.
Json report(const Arguments& arguments, const Bundle& bundle, const Checked& checked, const Json& state_before,
            const Findings& findings);

}  // namespace qsparse_device

#endif  // QSPARSE_DEVICE_REPORT_H_
