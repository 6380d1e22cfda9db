// One row through the selection and the quantiser.
#ifndef QSK_SRC_QUANTIZED_ROW_H_
#define QSK_SRC_QUANTIZED_ROW_H_

#include "kernels.h"
#include "sparsified_row.h"

namespace qsk {

// Quantises one row and returns gamma, or NaN (and zeros) for a row with NaN or Inf.
float quantize_row(const QuantizeKernels& kernels, const float* x, int64_t n, int8_t* q);

// Scratch of quantize_selected_row, aligned to 64.
int64_t quantize_selected_bytes(const Selection& selection, int64_t n);

// What selection and quantiser leave of a row: the q of at least this magnitude, and gamma.
struct QuantizedRow {
  float gamma;
  int32_t least;
};

// The same q and gamma as quantize_row of what TopKSparsify leaves of x, but without making that row; where |q| is
// below the returned `least`, q counts as 0. `selection` does not rescale. q can be read and written up to the next
// multiple of 32 beyond n.
QuantizedRow quantize_selected_row(const QuantizeKernels& kernels, const TopKKernels& topk, const Selection& selection,
                                   const float* x, int64_t n, void* scratch, int8_t* q);

}  // namespace qsk

#endif  // QSK_SRC_QUANTIZED_ROW_H_
