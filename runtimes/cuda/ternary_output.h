// The last step of both ternary products: from a sum of codes to a result.
#ifndef QSK_CUDA_TERNARY_OUTPUT_H_
#define QSK_CUDA_TERNARY_OUTPUT_H_

#include "joined_tiles.h"

namespace qsk_cuda {

constexpr int kTileOutputs = QSK_TERNARY_TILE_OUTPUTS;
constexpr int kTileBytes = kTileOutputs / 4;

// Codes are weights plus one, hence the sum of q that is taken away. The order of the float operations is the op's.
inline __device__ float descaled(int sum_of_codes, const QuantizedRow& row, float scale) {
  return static_cast<float>(sum_of_codes - row.sum) * ((row.gamma / 127.0f) * scale);
}

}  // namespace qsk_cuda

#endif  // QSK_CUDA_TERNARY_OUTPUT_H_
