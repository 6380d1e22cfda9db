// DenseMatMulNBits and GatherNBits: a 4- or 8-bit matrix that is read output by output, and rows of it.
#ifndef QSK_DENSE_MATMUL_NBITS_H_
#define QSK_DENSE_MATMUL_NBITS_H_

#include "qsk/parallel.h"
#include "qsk/variant.h"

#ifdef __cplusplus
extern "C" {
#endif

// Weights are output-major (the Python twin is qsparse_export/formats/nbits.py): row n holds the inputs of output n in
// order, lowest bits first, as codes plus 2^(bits - 1), padded to whole bytes; `group` consecutive inputs share a
// float16 scale.
QSK_API int64_t qsk_dense_row_bytes(int64_t k, int64_t bits);

typedef struct qsk_dense_matmul_nbits_args {
  int type;                // of x and y: QSK_FLOAT32 or QSK_FLOAT16
  const void* x;           // [m, k], contiguous
  const uint8_t* w;        // [n, qsk_dense_row_bytes(k, bits)]; any alignment
  const uint16_t* scales;  // float16 [n, ceil(k / group)]
  void* y;                 // [m, n], contiguous
  int64_t m, k, n;
  int64_t bits;   // 4 or 8
  int64_t group;  // a multiple of 8, or at least k
} qsk_dense_matmul_nbits_args;

// y = x dequantize(w)^T, summed in float32. The bits do not depend on the number of threads, but on the variant. A row
// with NaN or Inf gives a row of NaN.
QSK_API int64_t qsk_dense_matmul_nbits_scratch_bytes(const qsk_dense_matmul_nbits_args* args,
                                                     const qsk_parallel* parallel);
QSK_API int qsk_dense_matmul_nbits(const qsk_variant* variant, const qsk_dense_matmul_nbits_args* args,
                                   const qsk_parallel* parallel, void* scratch, int64_t scratch_bytes);

typedef struct qsk_gather_nbits_args {
  const int64_t* ids;  // [count], each 0..n-1
  const uint8_t* w;    // as above
  const uint16_t* scales;
  float* y;  // [count, k], contiguous
  int64_t count, k, n;
  int64_t bits, group;  // any group of at least 1
} qsk_gather_nbits_args;

// y[i] = code * scale of row ids[i]. No scratch is needed. QSK_BAD_INDEX for an id outside 0..n-1; y is unspecified
// then.
QSK_API int64_t qsk_gather_nbits_scratch_bytes(const qsk_gather_nbits_args* args, const qsk_parallel* parallel);
QSK_API int qsk_gather_nbits(const qsk_variant* variant, const qsk_gather_nbits_args* args,
                             const qsk_parallel* parallel, void* scratch, int64_t scratch_bytes);

#ifdef __cplusplus
}
#endif

#endif  // QSK_DENSE_MATMUL_NBITS_H_
