// TernaryMatMul: int8-quantised rows times packed ternary weights.
#ifndef QSK_TERNARY_MATMUL_H_
#define QSK_TERNARY_MATMUL_H_

#include "qsk/parallel.h"
#include "qsk/variant.h"

#ifdef __cplusplus
extern "C" {
#endif

// Weights: uint8 [k, qsk_ternary_row_bytes(n)], channel-major; byte j of row c holds the outputs 4j..4j+3, output 4j+p
// as code w + 1 in the bits 2p and 2p+1 (the Python twin is qsparse_export/formats/ternary.py). Outputs are padded to a
// multiple of 128.
#define QSK_TERNARY_TILE_OUTPUTS 128
QSK_API int64_t qsk_ternary_row_bytes(int64_t n);

typedef struct qsk_ternary_matmul_args {
  int type;          // of x and y: QSK_FLOAT32 or QSK_FLOAT16 (IEEE binary16 as uint16_t)
  const void* x;     // [m, k], contiguous
  const uint8_t* w;  // [k, qsk_ternary_row_bytes(n)]; any alignment
  float scale;
  void* y;  // [m, n], contiguous
  int64_t m, k, n;
} qsk_ternary_matmul_args;

// Per row: quantise as qsk_quantize_rows, acc = sum of q * w in int32 over the channels with q != 0,
// y = float(acc) * ((gamma / 127) * scale). A row with NaN or Inf gives a row of NaN. The result does not depend on the
// variant or the number of threads. k is at most 8,000,000, so that the sums fit.
QSK_API int64_t qsk_ternary_matmul_scratch_bytes(const qsk_ternary_matmul_args* args, const qsk_parallel* parallel);
QSK_API int qsk_ternary_matmul(const qsk_variant* variant, const qsk_ternary_matmul_args* args,
                               const qsk_parallel* parallel, void* scratch, int64_t scratch_bytes);

#ifdef __cplusplus
}
#endif

#endif  // QSK_TERNARY_MATMUL_H_
