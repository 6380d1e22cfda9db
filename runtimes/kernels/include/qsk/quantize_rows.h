// Absmax int8 quantisation of rows, as BitNet does it.
#ifndef QSK_QUANTIZE_ROWS_H_
#define QSK_QUANTIZE_ROWS_H_

#include "qsk/variant.h"

#ifdef __cplusplus
extern "C" {
#endif

// x: float32 [rows, width]; q: int8 [rows, width]; gamma: float32 [rows].
// gamma = max(max|x|, 1e-5), q = clip(rint((127 / gamma) * x), -128, 127), ties to even. A row with NaN or Inf gets
// gamma = NaN and q = 0.
QSK_API int qsk_quantize_rows(const qsk_variant* variant, const float* x, int64_t rows, int64_t width, int8_t* q,
                              float* gamma);

#ifdef __cplusplus
}
#endif

#endif  // QSK_QUANTIZE_ROWS_H_
