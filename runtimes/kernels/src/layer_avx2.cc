// Attention, gated activations and norms: with AVX2.
#include "attention_lanes.h"
#include "rows_lanes.h"

namespace qsk {

const LayerKernels layer_avx2 = {attend, merge, rotate, gated_relu2, gated_silu, add, square_sum, scale};

}  // namespace qsk
