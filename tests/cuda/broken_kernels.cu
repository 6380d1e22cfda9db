// Kernels with the mistakes that the emulation is there to find. Each is run by test_emulation.py.
#include "device.h"

namespace {

using namespace qsk_cuda;

struct ReverseShared {
  int value[kThreads];
};

// Reverses a block's values; with is_broken nothing makes a thread wait for the one whose value it takes.
__global__ void reverse(int* values, bool is_broken) {
  QSK_SHARED(ReverseShared, shared);
  shared.value[threadIdx.x] = values[threadIdx.x];
  if (!is_broken) __syncthreads();
  values[threadIdx.x] = shared.value[kThreads - 1 - threadIdx.x];
}

__global__ void some_wait(int*, bool is_broken) {
  if (!is_broken || threadIdx.x < 100) __syncthreads();
}

__global__ void lanes_differ(int* values, bool is_broken) {
  if (is_broken && threadIdx.x % 2 == 0) {
    values[threadIdx.x] = static_cast<int>(__ballot_sync(kAllLanes, true));
  } else {
    values[threadIdx.x] = __shfl_sync(kAllLanes, values[threadIdx.x], 0);
  }
}

struct LargeShared {
  int value[49 * 256];
};
struct LargestShared {
  int value[48 * 256];
};

__global__ void too_much_shared(int* values, bool is_broken) {
  if (is_broken) {
    QSK_SHARED(LargeShared, shared);
    values[threadIdx.x] = shared.value[threadIdx.x];
  } else {
    QSK_SHARED(LargestShared, shared);
    values[threadIdx.x] = shared.value[threadIdx.x];
  }
}

__global__ void nothing(int*, bool) {}

}  // namespace

// values: int32 [256].
extern "C" void broken_reverse(int* values, bool is_broken) { launch(reverse, dim3(1), nullptr, values, is_broken); }
extern "C" void broken_some_wait(int* values, bool is_broken) {
  launch(some_wait, dim3(1), nullptr, values, is_broken);
}
extern "C" void broken_lanes_differ(int* values, bool is_broken) {
  launch(lanes_differ, dim3(1), nullptr, values, is_broken);
}
extern "C" void broken_too_much_shared(int* values, bool is_broken) {
  launch(too_much_shared, dim3(1), nullptr, values, is_broken);
}
extern "C" void broken_empty_grid(int* values, bool is_broken) {
  launch(nothing, dim3(is_broken ? 0 : 1), nullptr, values, is_broken);
}
extern "C" void broken_wide_grid(int* values, bool is_broken) {
  launch(nothing, dim3(1, is_broken ? 65536 : 1), nullptr, values, is_broken);
}
