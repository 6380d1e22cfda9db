// Sparse ternary GEMV for few rows: reads the weight rows of active channels, 128 consecutive bytes a warp at a time.
#include "ternary_output.h"

namespace qsk_cuda {
namespace {

constexpr int kWordOutputs = 16;
constexpr int kWarpOutputs = kWarp * kWordOutputs;  // 512: four tiles

struct GemvShared {
  int sum[kWarps][kWordOutputs][kWarp + 1];  // one more, so that reading along the outputs hits every bank
};

// Adds four channels to the sums of 16 outputs: sum[4 j + p] belongs to byte j, plane p. A plane is masked where it is,
// and those of the upper half once shifted down, so that odd planes carry a factor of 4.
inline __device__ void add_channels(const uint32_t (&words)[4], int q4, int (&sum)[kWordOutputs]) {
  uint32_t bytes[4];
  transpose_bytes(words, bytes);
  for (int j = 0; j < 4; ++j) {
    const uint32_t upper = bytes[j] >> 4;
    sum[4 * j + 0] = __dp4a(static_cast<int>(bytes[j] & 0x03030303u), q4, sum[4 * j + 0]);
    sum[4 * j + 1] = __dp4a(static_cast<int>(bytes[j] & 0x0c0c0c0cu), q4, sum[4 * j + 1]);
    sum[4 * j + 2] = __dp4a(static_cast<int>(upper & 0x03030303u), q4, sum[4 * j + 2]);
    sum[4 * j + 3] = __dp4a(static_cast<int>(upper & 0x0c0c0c0cu), q4, sum[4 * j + 3]);
  }
}

// Block (row, 512 outputs, slice of the active channels); the warps take fours of channels in turn.
__global__ void __launch_bounds__(kThreads)
    ternary_gemv(const uint8_t* w, int row_bytes, const QuantizedRow* summary, ActiveChannels active, int* sums) {
  QSK_SHARED(GemvShared, shared);
  const int row = blockIdx.x, lane = lane_of_thread(), warp = warp_of_thread();
  const int fours = (summary[row].active + 3) / 4;
  const int begin = static_cast<int>(static_cast<int64_t>(fours) * blockIdx.z / gridDim.z);
  const int end = static_cast<int>(static_cast<int64_t>(fours) * (blockIdx.z + 1) / gridDim.z);
  const int32_t* index = active.index + row * active.stride;
  const int8_t* value = active.value + row * active.stride;
  const int64_t offset = static_cast<int64_t>(blockIdx.y) * (4 * kWarp) + 4 * lane;
  const bool is_inside = offset < row_bytes;
  int sum[kWordOutputs] = {};
#pragma unroll 2
  for (int four = begin + warp; four < end; four += kWarps) {
    const int4 channel = *reinterpret_cast<const int4*>(index + 4 * four);
    const int q4 = *reinterpret_cast<const int*>(value + 4 * four);
    const int channels[4] = {channel.x, channel.y, channel.z, channel.w};
    uint32_t words[4];
    for (int i = 0; i < 4; ++i) {
      const uint8_t* word = w + static_cast<int64_t>(channels[i]) * row_bytes + offset;
      words[i] = is_inside ? *reinterpret_cast<const uint32_t*>(word) : 0;
    }
    add_channels(words, q4, sum);
  }
  for (int i = 0; i < kWordOutputs; ++i) shared.sum[warp][i][lane] = i % 2 == 0 ? sum[i] : sum[i] / 4;
  __syncthreads();
  const int64_t columns = 4 * static_cast<int64_t>(row_bytes);
  sums += (static_cast<int64_t>(blockIdx.z) * gridDim.x + row) * columns;
  for (int output = threadIdx.x; output < kWarpOutputs; output += kThreads) {
    int total = 0;
    for (int of = 0; of < kWarps; ++of) total += shared.sum[of][output % kWordOutputs][output / kWordOutputs];
    const int64_t column = static_cast<int64_t>(blockIdx.y) * kWarpOutputs + output;
    if (column < columns) sums[column] = total;
  }
}

// Adds up the slices. Block (row, two tiles).
template <typename T>
__global__ void __launch_bounds__(kThreads) ternary_finish(const int* sums, int slices, const QuantizedRow* summary,
                                                           const float* scales, JoinedMatrices joined, T* y) {
  const int tile = blockIdx.y * (kThreads / kTileOutputs) + threadIdx.x / kTileOutputs;
  if (tile >= joined.tiles) return;
  const int matrix = matrix_of_tile(joined, tile);
  const int output = (tile - joined.first_tile[matrix]) * kTileOutputs + threadIdx.x % kTileOutputs;
  if (output >= joined.n[matrix]) return;
  const int64_t row = blockIdx.x, columns = static_cast<int64_t>(joined.tiles) * kTileOutputs;
  const int64_t column = static_cast<int64_t>(tile) * kTileOutputs + threadIdx.x % kTileOutputs;
  int sum = 0;
  for (int slice = 0; slice < slices; ++slice) {
    sum += sums[(static_cast<int64_t>(slice) * gridDim.x + row) * columns + column];
  }
  y[row * joined.outputs + joined.first_output[matrix] + output] =
      from_float<T>(descaled(sum, summary[row], scales[matrix]));
}

}  // namespace

void enqueue_ternary_gemv(const TernaryProduct& product, ActiveChannels active, int64_t slices, int32_t* sums,
                          const qsk_cuda_queue& queue) {
  const JoinedMatrices& joined = product.joined;
  if (product.m == 0 || joined.outputs == 0) return;
  const auto rows = static_cast<unsigned>(product.m);
  const auto blocks = static_cast<unsigned>(ceil_div(joined.tiles, kWarpOutputs / kTileOutputs));
  launch(ternary_gemv, dim3(rows, blocks, static_cast<unsigned>(slices)), queue.stream, product.w,
         joined.tiles * kTileBytes, product.summary, active, sums);
  const dim3 grid(rows, static_cast<unsigned>(ceil_div(joined.tiles, kThreads / kTileOutputs)));
  const int count = static_cast<int>(slices);
  if (product.type == QSK_FLOAT16) {
    launch(ternary_finish<uint16_t>, grid, queue.stream, sums, count, product.summary, product.scales, joined,
           static_cast<uint16_t*>(product.y));
  } else {
    launch(ternary_finish<float>, grid, queue.stream, sums, count, product.summary, product.scales, joined,
           static_cast<float*>(product.y));
  }
}

}  // namespace qsk_cuda
