// Absmax int8 quantisation of rows, as BitNet does it.
#ifndef QSK_QUANTIZE_ROWS_H_
#define QSK_QUANTIZE_ROWS_H_

#include "qsk/parallel.h"
#include "qsk/variant.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct qsk_quantize_rows_args {
  const float* x;  // [rows, width], contiguous
  int8_t* q;       // [rows, width]
  float* gamma;    // [rows]
  int64_t rows;
  int64_t width;
} qsk_quantize_rows_args;

// gamma = max(max|x|, 1e-5), q = clip(rint((127 / gamma) * x), -128, 127), ties to even. A row with NaN or Inf gets
// gamma = NaN and q = 0. No scratch is needed.
QSK_API int64_t qsk_quantize_rows_scratch_bytes(const qsk_quantize_rows_args* args, const qsk_parallel* parallel);
QSK_API int qsk_quantize_rows(const qsk_variant* variant, const qsk_quantize_rows_args* args,
                              const qsk_parallel* parallel, void* scratch, int64_t scratch_bytes);

#ifdef __cplusplus
}
#endif

#endif  // QSK_QUANTIZE_ROWS_H_
