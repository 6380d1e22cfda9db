// Dense ternary GEMM for many rows, on the int8 tensor cores that every architecture from sm_80 on has.
#include "ternary_output.h"

namespace qsk_cuda {
namespace {

constexpr int kRows = 64;                 // of a block's tile; its outputs are one tile of the weights
constexpr int kChannels = kGemmChannels;  // of a step
constexpr int kFours = kChannels / 4;     // a word holds four channels
constexpr int kRowWords = kFours + 4;     // strides that keep the fragments' reads in different banks
constexpr int kOutputWords = kTileOutputs + 8;
constexpr int kWarpRows = 32, kWarpOutputs = 32;  // 2 x 4 warps
constexpr int kRowTiles = kWarpRows / 16, kOutputTiles = kWarpOutputs / 8;
static_assert(kThreads == kFours * (kTileBytes / 4), "a thread unpacks one word of four channels");
static_assert((kRows / kWarpRows) * (kTileOutputs / kWarpOutputs) == kWarps, "the warps cover the tile");

struct alignas(16) GemmShared {
  int q[kRows][kRowWords];          // [row][k / 4]
  int codes[kFours][kOutputWords];  // [k / 4][output]
};

inline __device__ void load_rows(const int8_t* q, int64_t stride, int64_t m, int64_t row, int64_t channel,
                                 GemmShared& shared) {
  constexpr int kQuads = kFours / 4;  // of words in a row
  for (int i = threadIdx.x; i < kRows * kQuads; i += kThreads) {
    const int r = i / kQuads, quad = i % kQuads;
    const int4* from = reinterpret_cast<const int4*>(q + (row + r) * stride + channel + 16 * quad);
    *reinterpret_cast<int4*>(&shared.q[r][4 * quad]) = row + r < m ? *from : make_int4(0, 0, 0, 0);
  }
}

inline __device__ void load_codes(const uint8_t* w, int64_t row_bytes, int64_t k, int tile, int64_t channel,
                                  GemmShared& shared) {
  constexpr int kWords = kTileBytes / 4;
  const int four = threadIdx.x / kWords, word = threadIdx.x % kWords;
  uint32_t words[4], bytes[4];
  for (int i = 0; i < 4; ++i) {
    const int64_t c = channel + 4 * four + i;
    const uint8_t* from = w + c * row_bytes + static_cast<int64_t>(tile) * kTileBytes + 4 * word;
    words[i] = c < k ? *reinterpret_cast<const uint32_t*>(from) : 0;
  }
  transpose_bytes(words, bytes);
  for (int j = 0; j < 4; ++j) {
    constexpr uint32_t kCode = 0x03030303u;
    *reinterpret_cast<int4*>(&shared.codes[four][16 * word + 4 * j]) =
        make_int4(static_cast<int>(bytes[j] & kCode), static_cast<int>(bytes[j] >> 2 & kCode),
                  static_cast<int>(bytes[j] >> 4 & kCode), static_cast<int>(bytes[j] >> 6 & kCode));
  }
}

// Block (64 rows, tile). A lane's place in the fragments of mma.m16n8k32: row or output lane / 4, k / 4 = lane % 4.
// Two blocks on a multiprocessor are enough, and spare ptxas the limit of 64 registers with which it spills.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    ternary_gemm(const int8_t* q, int64_t stride, const uint8_t* w, int64_t m, int64_t k, const QuantizedRow* summary,
                 const float* scales, JoinedMatrices joined, T* y) {
  QSK_SHARED(GemmShared, shared);
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows;
  const int tile = blockIdx.y;
  const int64_t row_bytes = static_cast<int64_t>(joined.tiles) * kTileBytes;
  const int warp_row = warp_of_thread() % 2 * kWarpRows, warp_output = warp_of_thread() / 2 * kWarpOutputs;
  const int major = lane_of_thread() / 4, minor = lane_of_thread() % 4;
  int sum[kRowTiles][kOutputTiles][4] = {};
  for (int64_t channel = 0; channel < k; channel += kChannels) {
    load_rows(q, stride, m, first_row, channel, shared);
    load_codes(w, row_bytes, k, tile, channel, shared);
    __syncthreads();
    for (int four = minor; four < kFours; four += 8) {
      int a[kRowTiles][4], b[kOutputTiles][2];
      for (int i = 0; i < kRowTiles; ++i) {
        const int r = warp_row + 16 * i + major;
        a[i][0] = shared.q[r][four];
        a[i][1] = shared.q[r + 8][four];
        a[i][2] = shared.q[r][four + 4];
        a[i][3] = shared.q[r + 8][four + 4];
      }
      for (int j = 0; j < kOutputTiles; ++j) {
        const int output = warp_output + 8 * j + major;
        b[j][0] = shared.codes[four][output];
        b[j][1] = shared.codes[four + 4][output];
      }
      for (int i = 0; i < kRowTiles; ++i) {
        for (int j = 0; j < kOutputTiles; ++j) multiply_tiles(sum[i][j], a[i], b[j]);
      }
    }
    __syncthreads();
  }
  const int matrix = matrix_of_tile(joined, tile);
  const float scale = scales[matrix];
  const int tile_output = (tile - joined.first_tile[matrix]) * kTileOutputs;
  for (int i = 0; i < kRowTiles; ++i) {
    for (int half = 0; half < 2; ++half) {
      const int64_t row = first_row + warp_row + 16 * i + 8 * half + major;
      if (row >= m) continue;
      for (int j = 0; j < kOutputTiles; ++j) {
        for (int odd = 0; odd < 2; ++odd) {
          const int output = tile_output + warp_output + 8 * j + 2 * minor + odd;
          if (output >= joined.n[matrix]) continue;
          y[row * joined.outputs + joined.first_output[matrix] + output] =
              from_float<T>(descaled(sum[i][j][2 * half + odd], summary[row], scale));
        }
      }
    }
  }
}

}  // namespace

void enqueue_ternary_gemm(const TernaryProduct& product, const int8_t* q, int64_t stride, const qsk_cuda_queue& queue) {
  const JoinedMatrices& joined = product.joined;
  if (product.m == 0 || joined.outputs == 0) return;
  const dim3 grid(static_cast<unsigned>(ceil_div(product.m, kRows)), static_cast<unsigned>(joined.tiles));
  if (product.type == QSK_FLOAT16) {
    launch(ternary_gemm<uint16_t>, grid, queue.stream, q, stride, product.w, product.m, product.k, product.summary,
           product.scales, joined, static_cast<uint16_t*>(product.y));
  } else {
    launch(ternary_gemm<float>, grid, queue.stream, q, stride, product.w, product.m, product.k, product.summary,
           product.scales, joined, static_cast<float*>(product.y));
  }
}

}  // namespace qsk_cuda
