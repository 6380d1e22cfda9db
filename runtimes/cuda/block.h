// What the threads of a block compute together. Each function is called by all of them and ends with a barrier, so that
// the shared memory can be used again at once.
#ifndef QSK_CUDA_BLOCK_H_
#define QSK_CUDA_BLOCK_H_

#include "device.h"

namespace qsk_cuda {

struct BlockShared {
  uint32_t of_warp[kWarps];
};

inline __device__ uint32_t block_max(uint32_t value, BlockShared& shared) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const uint32_t other = __shfl_down_sync(kAllLanes, value, distance);
    value = other > value ? other : value;
  }
  if (lane_of_thread() == 0) shared.of_warp[warp_of_thread()] = value;
  __syncthreads();
  for (int warp = 0; warp < kWarps; ++warp) value = shared.of_warp[warp] > value ? shared.of_warp[warp] : value;
  __syncthreads();
  return value;
}

// The sum of the values of all threads before this one, and of all in *total.
inline __device__ int block_sum_before(int value, BlockShared& shared, int* total) {
  int inclusive = value;
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int other = __shfl_up_sync(kAllLanes, inclusive, distance);
    if (lane_of_thread() >= distance) inclusive += other;
  }
  if (lane_of_thread() == kWarp - 1) shared.of_warp[warp_of_thread()] = static_cast<uint32_t>(inclusive);
  __syncthreads();
  int before = inclusive - value, sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) {
    const int of_warp = static_cast<int>(shared.of_warp[warp]);
    if (warp < warp_of_thread()) before += of_warp;
    sum += of_warp;
  }
  __syncthreads();
  *total = sum;
  return before;
}

inline __device__ int block_sum(int value, BlockShared& shared) {
  int total;
  block_sum_before(value, shared, &total);
  return total;
}

}  // namespace qsk_cuda

#endif  // QSK_CUDA_BLOCK_H_
