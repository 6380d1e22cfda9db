// SparseTernaryMatMul: top-k, int8 quantisation and several packed ternary matrices that share the mask, in one call.
#ifndef QSK_SPARSE_TERNARY_MATMUL_H_
#define QSK_SPARSE_TERNARY_MATMUL_H_

#include "qsk/parallel.h"
#include "qsk/ternary_matmul.h"
#include "qsk/variant.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct qsk_sparse_ternary_matmul_args {
  int type;       // of x and y: QSK_FLOAT32 or QSK_FLOAT16
  const void* x;  // [m, k], contiguous
  // [k, sum of qsk_ternary_row_bytes(n[i])]: row c is channel c of every matrix, one after the other, each padded
  const uint8_t* w;
  const float* scales;  // [matrices]
  const int64_t* n;     // [matrices] outputs of each
  int64_t matrices;     // 0..QSK_MOST_MATRICES
  void* y;              // [m, sum of n], contiguous, without padding
  int64_t m, k;
  int64_t top_k;   // kept per row, or per block: as qsk_topk_sparsify_args; k with block 0: nothing is selected, and
  int64_t block;   // only channels that are zero by themselves are skipped
  int rescale_l2;  // as qsk_topk_sparsify_args
} qsk_sparse_ternary_matmul_args;

// The same bits as qsk_topk_sparsify and then qsk_ternary_matmul with each matrix.
QSK_API int64_t qsk_sparse_ternary_matmul_scratch_bytes(const qsk_sparse_ternary_matmul_args* args,
                                                        const qsk_parallel* parallel);
QSK_API int qsk_sparse_ternary_matmul(const qsk_variant* variant, const qsk_sparse_ternary_matmul_args* args,
                                      const qsk_parallel* parallel, void* scratch, int64_t scratch_bytes);

#ifdef __cplusplus
}
#endif

#endif  // QSK_SPARSE_TERNARY_MATMUL_H_
