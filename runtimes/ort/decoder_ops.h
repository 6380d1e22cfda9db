// The custom ops between the matrix products of a decoder layer: attention, the gated activation, residual and norm.
#ifndef QSPARSE_ORT_DECODER_OPS_H_
#define QSPARSE_ORT_DECODER_OPS_H_

#include <vector>

#include "onnxruntime_c_api.h"

namespace qsparse_ort {

std::vector<const OrtCustomOp*> decoder_ops();

}  // namespace qsparse_ort

#endif  // QSPARSE_ORT_DECODER_OPS_H_
