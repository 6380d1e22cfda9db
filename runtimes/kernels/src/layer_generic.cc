// Attention, gated activations and norms: for any processor.
#include "attention_lanes.h"
#include "rows_lanes.h"

namespace qsk {

const LayerKernels layer_generic = {attend, merge, rotate, gated_relu2, gated_silu, add, square_sum, scale};

}  // namespace qsk
