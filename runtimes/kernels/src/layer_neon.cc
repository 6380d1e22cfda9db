// Attention, gated activations and norms: with NEON.
#include "attention_lanes.h"
#include "rows_lanes.h"

namespace qsk {

const LayerKernels layer_neon = {attend, merge, rotate, gated_relu2, gated_silu, add, square_sum, scale};

}  // namespace qsk
