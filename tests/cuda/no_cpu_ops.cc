// Stands in for the ops of the CPU that a library leaves out.
#include "op_kernel.h"

namespace qsparse_ort {

__attribute__((weak)) std::vector<const OrtCustomOp*> topk_ops() { return {}; }
__attribute__((weak)) std::vector<const OrtCustomOp*> ternary_ops() { return {}; }
__attribute__((weak)) std::vector<const OrtCustomOp*> sparse_matmul_ops() { return {}; }
__attribute__((weak)) std::vector<const OrtCustomOp*> head_ops() { return {}; }
__attribute__((weak)) std::vector<const OrtCustomOp*> decoder_ops() { return {}; }

}  // namespace qsparse_ort
