// Counts the calls of every op by the kernel variant that ran, so that a run can prove which path it took.
#ifndef QSPARSE_ORT_CALLS_H_
#define QSPARSE_ORT_CALLS_H_

#include "qsk/variant.h"

namespace qsparse_ort {

enum Op {
  kTopKSparsify,
  kTernaryMatMul,
  kSparseTernaryMatMul,
  kSparseMatMul,
  kSparseMatMulNBits,
  kDenseMatMulNBits,
  kGatherNBits,
  kCachedAttention,
  kGatedActivation,
  kAddRmsNorm,
  kOpCount
};
const char* op_name(Op op);

void count_call(Op op, const qsk_variant* variant);
// Of a kernel for NVIDIA GPUs; shown as the variant "cuda".
void count_cuda_call(Op op);

}  // namespace qsparse_ort

extern "C" {

// Writes {"TopKSparsify": {"avx2": 3}, ...}, only counts above 0, of all sessions in this process since the last reset,
// as at most `capacity` bytes including the final 0. Returns the bytes that the whole text takes.
QSK_API int64_t qsparse_ort_calls(char* json, int64_t capacity);
QSK_API void qsparse_ort_reset_calls(void);
// The names of all registered ops, separated by spaces.
QSK_API const char* qsparse_ort_ops(void);
}

#endif  // QSPARSE_ORT_CALLS_H_
