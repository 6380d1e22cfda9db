// Where a tile of matrices that stand side by side belongs.
#ifndef QSK_CUDA_JOINED_TILES_H_
#define QSK_CUDA_JOINED_TILES_H_

#include "device.h"
#include "steps.h"

namespace qsk_cuda {

// The matrix that a tile belongs to. One without outputs begins where the next one does, and the last of them counts.
inline __device__ int matrix_of_tile(const JoinedMatrices& joined, int tile) {
  int matrix = 0;
  while (matrix + 1 < joined.matrices && joined.first_tile[matrix + 1] <= tile) ++matrix;
  return matrix;
}

}  // namespace qsk_cuda

#endif  // QSK_CUDA_JOINED_TILES_H_
