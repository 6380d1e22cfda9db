#ifndef QSK_SRC_SPARSIFIED_ROW_H_
#define QSK_SRC_SPARSIFIED_ROW_H_

#include "kernels.h"

namespace qsk {

// What TopKSparsify keeps of a row; qsk/topk_sparsify.h says what each means.
struct Selection {
  int64_t k;
  int64_t block;
  bool rescale_l2;
};

// Scratch of one row's selection, aligned to 64.
int64_t select_bytes(const Selection& selection, int64_t width);

// y = the kept channels of x [width], zeros elsewhere; y may be x.
void sparsify_row(const TopKKernels& kernels, const Selection& selection, const float* x, int64_t width, void* scratch,
                  float* y);

}  // namespace qsk

#endif  // QSK_SRC_SPARSIFIED_ROW_H_
