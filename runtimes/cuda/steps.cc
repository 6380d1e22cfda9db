#include "steps.h"

namespace qsk_cuda {

int join_matrices(const int64_t* n, int64_t matrices, int64_t tile_outputs, JoinedMatrices* joined) {
  if (matrices < 0 || matrices > QSK_MOST_MATRICES) return QSK_BAD_SIZE;
  if (matrices > 0 && n == nullptr) return QSK_NULL_ARGUMENT;
  *joined = {};
  joined->matrices = static_cast<int>(matrices);
  int64_t tiles = 0, outputs = 0;
  for (int64_t i = 0; i < matrices; ++i) {
    if (n[i] < 0 || n[i] > INT32_MAX) return QSK_BAD_SIZE;
    joined->first_tile[i] = static_cast<int>(tiles);
    joined->first_output[i] = static_cast<int>(outputs);
    joined->n[i] = static_cast<int>(n[i]);
    tiles += ceil_div(n[i], tile_outputs);
    outputs += n[i];
    if (tiles > kMostGridRows) return QSK_BAD_SIZE;
  }
  joined->tiles = static_cast<int>(tiles);
  joined->outputs = static_cast<int>(outputs);
  return QSK_OK;
}

int64_t slices_for(const qsk_cuda_queue& queue, int64_t blocks_per_slice, int64_t most) {
  const int64_t wanted = ceil_div(2 * queue.multiprocessors, blocks_per_slice > 0 ? blocks_per_slice : 1);
  const int64_t slices = wanted < most ? wanted : most;
  return slices < 1 ? 1 : slices > kMostGridRows ? kMostGridRows : slices;
}

}  // namespace qsk_cuda
