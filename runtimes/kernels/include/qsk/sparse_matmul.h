// SparseMatMul and SparseMatMulNBits: top-k, then several channel-major matrices that share the mask, in float32 sums.
#ifndef QSK_SPARSE_MATMUL_H_
#define QSK_SPARSE_MATMUL_H_

#include "qsk/parallel.h"
#include "qsk/variant.h"

#ifdef __cplusplus
extern "C" {
#endif

// Integer weights are channel-major (the Python twin is qsparse_export/formats/nbits.py): row c is a sequence of 32-bit
// words; eight words hold 8 * 32 / bits outputs, and the codes of word j are its planes: plane i (bits `bits * i` and
// up) is output 8 * i + j of those. Codes are two's complement; a weight is code * scale, and `group` consecutive
// channels of an output share a float16 scale. Outputs are padded to a multiple of 64.
#define QSK_NBITS_TILE_OUTPUTS 64
// Outputs that a row of `weight_type` has for `n` outputs: n for float weights.
QSK_API int64_t qsk_sparse_matmul_columns(int weight_type, int64_t n);

typedef struct qsk_sparse_matmul_args {
  int type;         // of x and y: QSK_FLOAT32 or QSK_FLOAT16
  const void* x;    // [m, k], contiguous
  int weight_type;  // QSK_FLOAT32, QSK_FLOAT16, QSK_INT8 or QSK_INT4
  const void* w;    // [k, sum of columns(n[i])]: row c is channel c of every matrix, one after the other; any alignment
  const uint16_t*
      scales;        // float16 [ceil(k / group), sum of columns(n[i])], in the order of the outputs; integers only
  int64_t group;     // integers only, at least 1
  const int64_t* n;  // [matrices] outputs of each
  int64_t matrices;  // 0..QSK_MOST_MATRICES
  void* y;           // [m, sum of n], contiguous, without padding
  int64_t m, k;
  int64_t top_k;   // kept per row, or per block: as qsk_topk_sparsify_args; k with block 0: nothing is selected, and
  int64_t block;   // only channels that are zero by themselves are skipped
  int rescale_l2;  // as qsk_topk_sparsify_args
} qsk_sparse_matmul_args;

// y = (x * mask) w, summed in float32. The bits do not depend on the number of threads, but on the variant: sums have
// no order by definition. With integer weights a masked row with NaN or Inf gives a row of NaN. Weights must be finite.
QSK_API int64_t qsk_sparse_matmul_scratch_bytes(const qsk_sparse_matmul_args* args, const qsk_parallel* parallel);
QSK_API int qsk_sparse_matmul(const qsk_variant* variant, const qsk_sparse_matmul_args* args,
                              const qsk_parallel* parallel, void* scratch, int64_t scratch_bytes);

#ifdef __cplusplus
}
#endif

#endif  // QSK_SPARSE_MATMUL_H_
