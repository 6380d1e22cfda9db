#ifndef QSK_SRC_QUANTIZED_ROW_H_
#define QSK_SRC_QUANTIZED_ROW_H_

#include "kernels.h"

namespace qsk {

// Quantises one row and returns gamma, or NaN (and zeros) for a row with NaN or Inf. `sum` is the sum of q.
float quantize_row(const QuantizeKernels& kernels, const float* x, int64_t n, int8_t* q, int32_t* sum);

}  // namespace qsk

#endif  // QSK_SRC_QUANTIZED_ROW_H_
