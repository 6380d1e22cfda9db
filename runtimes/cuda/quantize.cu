// Absmax int8 quantisation of rows, as dense rows or as lists of the channels that are not zero.
#include "block.h"
#include "steps.h"

namespace qsk_cuda {
namespace {

constexpr float kGammaFloor = 1e-5f;

struct QuantizeShared {
  BlockShared block;
};

// max(max|x|, 1e-5), or NaN for a row with NaN or Inf.
template <typename T>
__device__ float gamma_of(const T* x, int64_t width, BlockShared& shared) {
  uint32_t largest = 0;
  for (int64_t i = threadIdx.x; i < width; i += kThreads) {
    const uint32_t magnitude = __float_as_uint(to_float(x[i])) & kMagnitudeBits;
    largest = magnitude > largest ? magnitude : largest;
  }
  largest = block_max(largest, shared);
  if (largest >= kInfinityBits) return not_a_number();
  const float gamma = __uint_as_float(largest);
  return gamma < kGammaFloor ? kGammaFloor : gamma;
}

inline __device__ int quantized(float x, float inverse) {
  const float rounded = rintf(inverse * x);  // ties to even
  return static_cast<int>(rounded < -128.0f ? -128.0f : rounded > 127.0f ? 127.0f : rounded);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    quantize_rows(const T* x, int64_t width, int8_t* q, int64_t stride, float* gamma, QuantizedRow* summary) {
  QSK_SHARED(QuantizeShared, shared);
  const int64_t row = blockIdx.x;
  x += row * width;
  q += row * stride;
  const float row_gamma = gamma_of(x, width, shared.block);
  const bool is_bad = !is_finite(row_gamma);
  const float inverse = 127.0f / row_gamma;
  int sum = 0, active = 0;
  for (int64_t i = threadIdx.x; i < stride; i += kThreads) {
    const int value = i < width && !is_bad ? quantized(to_float(x[i]), inverse) : 0;
    q[i] = static_cast<int8_t>(value);
    sum += value;
    active += value != 0;
  }
  if (summary != nullptr) {
    sum = block_sum(sum, shared.block);
    active = block_sum(active, shared.block);
    if (threadIdx.x == 0) summary[row] = {row_gamma, sum, active};
  }
  if (gamma != nullptr && threadIdx.x == 0) gamma[row] = row_gamma;
}

// In the order of the channels: reads of neighbouring channels stay together.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    quantize_active(const T* x, int64_t width, ActiveChannels list, QuantizedRow* summary) {
  QSK_SHARED(QuantizeShared, shared);
  constexpr int kEach = 4;  // channels of a thread in a round: a quarter of the barriers
  const int64_t row = blockIdx.x;
  x += row * width;
  int32_t* index = list.index + row * list.stride;
  int8_t* value = list.value + row * list.stride;
  const float gamma = gamma_of(x, width, shared.block);
  const int64_t usable = is_finite(gamma) ? width : 0;
  const float inverse = 127.0f / gamma;
  int sum = 0, listed = 0;
  for (int64_t start = 0; start < usable; start += kThreads * kEach) {
    const int64_t first = start + threadIdx.x * kEach;
    int q[kEach], own = 0;
    for (int i = 0; i < kEach; ++i) {
      q[i] = first + i < usable ? quantized(to_float(x[first + i]), inverse) : 0;
      sum += q[i];
      own += q[i] != 0;
    }
    int of_round;
    int position = listed + block_sum_before(own, shared.block, &of_round);
    for (int i = 0; i < kEach; ++i) {
      if (q[i] == 0) continue;
      index[position] = static_cast<int32_t>(first + i);
      value[position++] = static_cast<int8_t>(q[i]);
    }
    listed += of_round;
  }
  sum = block_sum(sum, shared.block);
  const int padding = listed + threadIdx.x;
  if (threadIdx.x < 4 && padding < (listed + 3) / 4 * 4) {
    index[padding] = 0;
    value[padding] = 0;
  }
  if (threadIdx.x == 0) summary[row] = {gamma, sum, listed};
}

}  // namespace

void enqueue_quantize(int type, const void* x, int64_t rows, int64_t width, int8_t* q, int64_t stride, float* gamma,
                      QuantizedRow* summary, const qsk_cuda_queue& queue) {
  if (rows == 0) return;
  const dim3 grid(static_cast<unsigned>(rows));
  if (type == QSK_FLOAT16) {
    const auto* half = static_cast<const uint16_t*>(x);
    launch(quantize_rows<uint16_t>, grid, queue.stream, half, width, q, stride, gamma, summary);
  } else {
    launch(quantize_rows<float>, grid, queue.stream, static_cast<const float*>(x), width, q, stride, gamma, summary);
  }
}

void enqueue_quantize_active(int type, const void* x, int64_t rows, int64_t width, ActiveChannels active,
                             QuantizedRow* summary, const qsk_cuda_queue& queue) {
  if (rows == 0) return;
  const dim3 grid(static_cast<unsigned>(rows));
  if (type == QSK_FLOAT16) {
    launch(quantize_active<uint16_t>, grid, queue.stream, static_cast<const uint16_t*>(x), width, active, summary);
  } else {
    launch(quantize_active<float>, grid, queue.stream, static_cast<const float*>(x), width, active, summary);
  }
}

}  // namespace qsk_cuda

int64_t qsk_cuda_quantize_rows_scratch_bytes(const qsk_quantize_rows_args*, const qsk_cuda_queue*) { return 0; }

int qsk_cuda_quantize_rows(const qsk_quantize_rows_args* args, const qsk_cuda_queue* queue, void*, int64_t) {
  using namespace qsk_cuda;
  if (args == nullptr || queue == nullptr) return QSK_NULL_ARGUMENT;
  if (args->rows < 0 || args->width < 0 || args->width > INT32_MAX || args->rows > INT32_MAX) return QSK_BAD_SIZE;
  if (args->rows > 0 && args->gamma == nullptr) return QSK_NULL_ARGUMENT;
  if (args->rows > 0 && args->width > 0 && (args->x == nullptr || args->q == nullptr)) return QSK_NULL_ARGUMENT;
  enqueue_quantize(QSK_FLOAT32, args->x, args->rows, args->width, args->q, args->width, args->gamma, nullptr, *queue);
  return launch_status();
}
