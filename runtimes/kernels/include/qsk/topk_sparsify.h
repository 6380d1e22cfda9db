// TopKSparsify: keep the k largest magnitudes of every row (or block of a row), zero the rest.
#ifndef QSK_TOPK_SPARSIFY_H_
#define QSK_TOPK_SPARSIFY_H_

#include "qsk/parallel.h"
#include "qsk/variant.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct qsk_topk_sparsify_args {
  int type;       // QSK_FLOAT32 or QSK_FLOAT16 (IEEE binary16 as uint16_t)
  const void* x;  // [rows, width], contiguous
  void* y;        // [rows, width]; may be x
  int64_t rows;
  int64_t width;
  int64_t k;       // kept per row, or per block; 0..(block ? block : width)
  int64_t block;   // 0: the whole row. A last, shorter block of r channels keeps min(k, r)
  int rescale_l2;  // divide the masked row by max(its L2 norm in float32, 1e-12)
} qsk_topk_sparsify_args;

// Exactly k by largest |x|; the lowest index wins ties; NaN ranks as +inf, and a NaN that is not selected is kept too.
// Scratch: qsk_topk_sparsify_scratch_bytes, aligned to 64. A NULL variant means qsk_variant_choose.
QSK_API int64_t qsk_topk_sparsify_scratch_bytes(const qsk_topk_sparsify_args* args, const qsk_parallel* parallel);
QSK_API int qsk_topk_sparsify(const qsk_variant* variant, const qsk_topk_sparsify_args* args,
                              const qsk_parallel* parallel, void* scratch, int64_t scratch_bytes);

#ifdef __cplusplus
}
#endif

#endif  // QSK_TOPK_SPARSIFY_H_
