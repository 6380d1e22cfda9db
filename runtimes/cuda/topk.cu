// TopKSparsify: exactly k per row or block of channels by largest magnitude, the lowest index first, NaN always kept.
#include "block.h"
#include "steps.h"

namespace qsk_cuda {
namespace {

constexpr float kNormFloor = 1e-12f;
constexpr int kDigits = 256;  // of 8 bits: one for each thread
static_assert(kDigits == kThreads, "a thread owns a digit");

// Magnitudes as integers of the same order; NaN counts as infinity.
inline __device__ uint32_t key_of(float value) {
  const uint32_t magnitude = __float_as_uint(value) & kMagnitudeBits;
  return magnitude > kInfinityBits ? kInfinityBits : magnitude;
}
inline __device__ uint32_t key_of(uint16_t half) {
  const uint32_t magnitude = half & 0x7fffu;
  return magnitude > 0x7c00u ? 0x7c00u : magnitude;
}
inline __device__ bool is_nan(float value) { return (__float_as_uint(value) & kMagnitudeBits) > kInfinityBits; }
inline __device__ bool is_nan(uint16_t half) { return (half & 0x7fffu) > 0x7c00u; }

struct Cut {
  uint32_t threshold;  // keys above it are kept
  int ties;            // and so many of those equal to it
  int equal;           // so many are equal to it
};

struct SelectShared {
  int count[kDigits];
  uint32_t digit;
  int room;
  int equal;
  BlockShared block;
};

// The k-th largest key of x[0..n-1], 0 < k < n, by radix: most significant digit first, 4 passes for float, 2 for half.
template <typename T>
__device__ Cut select(const T* x, int64_t n, int k, SelectShared& shared) {
  uint32_t prefix = 0;  // the digits of the key found so far
  int wanted = k;       // its rank among the keys with that prefix
  int equal = 0;
  for (int shift = 8 * sizeof(T) - 8; shift >= 0; shift -= 8) {
    shared.count[threadIdx.x] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < n; i += kThreads) {
      const uint32_t digits = key_of(x[i]) >> shift;
      if (digits >> 8 == prefix) atomicAdd(&shared.count[digits & 0xff], 1);
    }
    __syncthreads();
    const int digit = kDigits - 1 - threadIdx.x;  // the first thread owns the largest
    const int own = shared.count[digit];
    int total;
    const int before = block_sum_before(own, shared.block, &total);
    if (before < wanted && wanted <= before + own) {
      shared.digit = digit;
      shared.room = wanted - before;
      shared.equal = own;
    }
    __syncthreads();
    prefix = prefix << 8 | shared.digit;
    wanted = shared.room;
    equal = shared.equal;
  }
  return {prefix, wanted, equal};
}

// One block of threads for each unit: a row, or a block of channels in it.
template <typename T>
__global__ void __launch_bounds__(kThreads) topk_by_block(const T* x, T* y, int64_t width, int64_t unit, int k) {
  QSK_SHARED(SelectShared, shared);
  const int64_t units = (width + unit - 1) / unit;
  const int64_t row = blockIdx.x / units, begin = blockIdx.x % units * unit;
  const int64_t n = width - begin < unit ? width - begin : unit;
  x += row * width + begin;
  y += row * width + begin;
  if (k >= n) {
    for (int64_t i = threadIdx.x; i < n; i += kThreads) y[i] = x[i];
    return;
  }
  const Cut cut = k > 0 ? select(x, n, k, shared) : Cut{kInfinityBits, 0, 0};
  int seen = 0;  // ties before this round
  for (int64_t start = 0; start < n; start += kThreads) {
    const int64_t i = start + threadIdx.x;
    const T value = i < n ? x[i] : T(0);
    const uint32_t key = key_of(value);
    bool tie = i < n && key == cut.threshold;
    if (cut.ties < cut.equal) {  // else all of them are kept, and their order does not matter
      int of_round;
      const int before = block_sum_before(tie, shared.block, &of_round);
      tie = tie && seen + before < cut.ties;
      seen += of_round;
    } else {
      tie = tie && cut.ties > 0;
    }
    if (i < n) y[i] = key > cut.threshold || tie || is_nan(value) ? value : T(0);
  }
}

// One warp for each unit of at most 32 channels: a lane counts who is before it.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    topk_by_warp(const T* x, T* y, int64_t rows, int64_t width, int unit, int k) {
  const int64_t units = (width + unit - 1) / unit;
  const int64_t number = static_cast<int64_t>(blockIdx.x) * kWarps + warp_of_thread();
  if (number >= rows * units) return;
  const int64_t row = number / units, begin = number % units * unit;
  const int n = static_cast<int>(width - begin < unit ? width - begin : unit);
  const int lane = lane_of_thread();
  const int64_t position = row * width + begin + lane;
  const T value = lane < n ? x[position] : T(0);
  const uint32_t key = key_of(value);
  int rank = 0;
  for (int other = 0; other < n; ++other) {
    const uint32_t others = __shfl_sync(kAllLanes, key, other);
    rank += others > key || (others == key && other < lane);
  }
  if (lane < n) y[position] = rank < k || is_nan(value) ? value : T(0);
}

struct RescaleShared {
  float divisor;
};

// y / max(L2 norm, floor) of each row. The squares are added in the order of the CPU kernels, channel i to sum i % 16
// and then the sums, without fused multiply-adds: the same bits.
template <typename T>
__global__ void __launch_bounds__(kThreads) rescale_rows(T* y, int64_t width) {
  QSK_SHARED(RescaleShared, shared);
  constexpr int kSums = 16;
  y += static_cast<int64_t>(blockIdx.x) * width;
  if (warp_of_thread() == 0) {
    float sum = 0.0f;
    if (lane_of_thread() < kSums) {
      for (int64_t i = lane_of_thread(); i < width; i += kSums) {
        const float value = to_float(y[i]);
        sum = __fadd_rn(sum, __fmul_rn(value, value));
      }
    }
    float square_sum = 0.0f;
    for (int lane = 0; lane < kSums; ++lane) square_sum = __fadd_rn(square_sum, __shfl_sync(kAllLanes, sum, lane));
    const float norm = sqrtf(square_sum);
    if (lane_of_thread() == 0) shared.divisor = norm < kNormFloor ? kNormFloor : norm;  // a NaN stays NaN
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < width; i += kThreads) y[i] = from_float<T>(to_float(y[i]) / shared.divisor);
}

int64_t unit_of(const qsk_topk_sparsify_args& args) {
  return args.block > 0 && args.block < args.width ? args.block : args.width;
}

template <typename T>
void enqueue(const qsk_topk_sparsify_args& args, const qsk_cuda_queue& queue) {
  const T* x = static_cast<const T*>(args.x);
  T* y = static_cast<T*>(args.y);
  const int64_t unit = unit_of(args), all = args.rows * ceil_div(args.width, unit);
  const int k = static_cast<int>(args.k < unit ? args.k : unit);
  if (unit <= kWarp) {
    const unsigned blocks = static_cast<unsigned>(ceil_div(all, kWarps));
    launch(topk_by_warp<T>, dim3(blocks), queue.stream, x, y, args.rows, args.width, static_cast<int>(unit), k);
  } else {
    launch(topk_by_block<T>, dim3(static_cast<unsigned>(all)), queue.stream, x, y, args.width, unit, k);
  }
  if (args.rescale_l2) {
    launch(rescale_rows<T>, dim3(static_cast<unsigned>(args.rows)), queue.stream, y, args.width);
  }
}

int check(const qsk_topk_sparsify_args* args, const qsk_cuda_queue* queue) {
  if (args == nullptr || queue == nullptr) return QSK_NULL_ARGUMENT;
  if (args->type != QSK_FLOAT32 && args->type != QSK_FLOAT16) return QSK_BAD_TYPE;
  if (args->rows < 0 || args->width < 0 || args->block < 0) return QSK_BAD_SIZE;
  if (args->width > INT32_MAX || (args->width > 0 && args->rows > INT32_MAX / args->width)) return QSK_BAD_SIZE;
  if (args->k < 0 || args->k > (args->block > 0 ? args->block : args->width)) return QSK_BAD_K;
  const bool has_none = args->rows == 0 || args->width == 0;
  return has_none || (args->x != nullptr && args->y != nullptr) ? QSK_OK : QSK_NULL_ARGUMENT;
}

}  // namespace

bool selects(int64_t k, int64_t width, int64_t block, int rescale_l2) {
  return k < (block > 0 ? block : width) || rescale_l2 != 0;
}

void enqueue_topk(const qsk_topk_sparsify_args& args, const qsk_cuda_queue& queue) {
  if (args.rows == 0 || args.width == 0) return;
  args.type == QSK_FLOAT16 ? enqueue<uint16_t>(args, queue) : enqueue<float>(args, queue);
}

}  // namespace qsk_cuda

int64_t qsk_cuda_topk_sparsify_scratch_bytes(const qsk_topk_sparsify_args*, const qsk_cuda_queue*) { return 0; }

int qsk_cuda_topk_sparsify(const qsk_topk_sparsify_args* args, const qsk_cuda_queue* queue, void*, int64_t) {
  const int status = qsk_cuda::check(args, queue);
  if (status != QSK_OK) return status;
  qsk_cuda::enqueue_topk(*args, *queue);
  return qsk_cuda::launch_status();
}
