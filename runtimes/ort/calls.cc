#include "calls.h"

#include <stdio.h>

#include <atomic>
#include <string>

namespace qsparse_ort {
namespace {

constexpr int64_t kMostVariants = 16;
constexpr int64_t kCuda = kMostVariants;
std::atomic<int64_t> calls[kOpCount][kMostVariants + 1];

void append_count(std::string& counts, const char* variant, int64_t count) {
  if (count == 0) return;
  counts += counts.empty() ? "" : ", ";
  counts += '"' + std::string(variant) + "\": " + std::to_string(count);
}

}  // namespace

const char* op_name(Op op) {
  static const char* const names[kOpCount] = {
      "TopKSparsify",     "TernaryMatMul", "SparseTernaryMatMul", "SparseMatMul",    "SparseMatMulNBits",
      "DenseMatMulNBits", "GatherNBits",   "CachedAttention",     "GatedActivation", "AddRmsNorm"};
  return names[op];
}

void count_call(Op op, const qsk_variant* variant) {
  calls[op][qsk_variant_position(variant)].fetch_add(1, std::memory_order_relaxed);
}

void count_cuda_call(Op op) { calls[op][kCuda].fetch_add(1, std::memory_order_relaxed); }

}  // namespace qsparse_ort

int64_t qsparse_ort_calls(char* json, int64_t capacity) {
  using namespace qsparse_ort;
  std::string text = "{";
  for (int op = 0; op < kOpCount; ++op) {
    std::string counts;
    for (int64_t i = 0; i < qsk_variant_count() && i < kMostVariants; ++i) {
      append_count(counts, qsk_variant_name(qsk_variant_at(i)), calls[op][i].load(std::memory_order_relaxed));
    }
    append_count(counts, "cuda", calls[op][kCuda].load(std::memory_order_relaxed));
    if (counts.empty()) continue;
    text += text.size() > 1 ? ", " : "";
    text += '"' + std::string(op_name(static_cast<Op>(op))) + "\": {" + counts + "}";
  }
  text += "}";
  if (json != nullptr && capacity > 0) snprintf(json, static_cast<size_t>(capacity), "%s", text.c_str());
  return static_cast<int64_t>(text.size()) + 1;
}

void qsparse_ort_reset_calls() {
  for (auto& op : qsparse_ort::calls) {
    for (auto& count : op) count.store(0, std::memory_order_relaxed);
  }
}

const char* qsparse_ort_ops() {
  static const std::string names = [] {
    std::string text;
    for (int op = 0; op < qsparse_ort::kOpCount; ++op) {
      text += (op > 0 ? " " : "") + std::string(qsparse_ort::op_name(static_cast<qsparse_ort::Op>(op)));
    }
    return text;
  }();
  return names.c_str();
}
