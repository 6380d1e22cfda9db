// What a bundle's manifest says, as far as this program needs it.
#ifndef QSPARSE_DEVICE_BUNDLE_H_
#define QSPARSE_DEVICE_BUNDLE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "json.h"

namespace qsparse_device {

struct Bundle {
  std::string folder;
  Json manifest;
  std::string library;  // path; empty: the bundle has none

  // Whether the kernels run in `mode`: dense ones run as the bundle is meant to run.
  bool runs_kernels(const std::string& mode) const { return mode != "bodies" && !library.empty(); }
  // Path of the graph that `mode` runs. Throws std::runtime_error when the bundle cannot run in it.
  std::string graph(const std::string& mode) const;
  // The record of one way to run it in the parity section, or null.
  const Json& recorded(const std::string& mode) const;
  // The prompt that tokens were recorded after; empty where none were.
  std::vector<int64_t> recorded_prompt() const;
  // What was measured of `mode` when the bundle was exported (its channels' activity), or null.
  const Json& activity(const std::string& mode) const;
  int64_t vocabulary() const;
  int64_t most_positions() const;
  // The id that a generation starts with: the model's own beginning of text, else the first of prompt_ids.
  int64_t first_token() const;
  // What the target needs and `features` lack, separated by blanks.
  std::string lacking(const std::vector<std::string>& features) const;
};

// Reads FOLDER/manifest.json. Throws std::runtime_error when there is none or it describes no decoder.
Bundle read_bundle(const std::string& folder);

// The fixed prompt of benchmarks, as qsparse_export/bench/prompt.py: (7919 i + 1) mod `vocabulary`.
std::vector<int64_t> prompt_ids(int64_t vocabulary, int64_t tokens);

}  // namespace qsparse_device

#endif  // QSPARSE_DEVICE_BUNDLE_H_
