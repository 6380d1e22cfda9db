// SparseMatMulNBits for many rows: every weight is read once for 64 rows, as a code, and sums are scaled where a group
// of channels ends. float16 goes to the tensor cores that every architecture from sm_80 on has; they have none for
// float32.
#include "joined_tiles.h"

namespace qsk_cuda {
namespace {

constexpr int kRows = 64;      // of a block's tile
constexpr int kOutputs = 128;  // of it, which may belong to two matrices
constexpr int kTile = QSK_NBITS_TILE_OUTPUTS;
constexpr int kUnitWords = 8;  // hold 8 * planes outputs, plane i of word j output 8 i + j (formats/nbits.py)

template <int kBits>
struct Codes {
  static constexpr int kPlanes = 32 / kBits;
  static constexpr int kWords = kOutputs / kPlanes;  // of a channel in a block
  static constexpr uint32_t kZero = 1u << (kBits - 1);
  // A code plus kZero: 0 or more.
  static __device__ uint32_t raised(uint32_t word, int plane) {
    return (word >> (kBits * plane) & (2 * kZero - 1)) ^ kZero;
  }
  static __device__ int output(int word, int plane) {
    return word / kUnitWords * (kUnitWords * kPlanes) + kUnitWords * plane + word % kUnitWords;
  }
};

// A block's part of the weights. Words beyond the last column are 0.
template <int kBits>
struct WeightColumns {
  const uint8_t* w;
  int64_t row_bytes;

  __device__ uint32_t word(int64_t channel, int number) const {
    const int64_t byte = 4 * (static_cast<int64_t>(blockIdx.y) * Codes<kBits>::kWords + number);
    return byte < row_bytes ? *reinterpret_cast<const uint32_t*>(w + channel * row_bytes + byte) : 0;
  }
};

// The groups of a block's slice, and where their channels end.
struct Groups {
  int64_t first, last, size, k;
  __device__ int64_t end(int64_t group) const { return (group + 1) * size < k ? (group + 1) * size : k; }
};
inline __device__ Groups groups_of_slice(int64_t k, int64_t size) {
  const int64_t count = (k + size - 1) / size, slice = blockIdx.z;
  return {slice * count / gridDim.z, (slice + 1) * count / gridDim.z, size, k};
}

// Where the sums of one tile of the weights go: into `sums` [slices, m, columns] where there is more than one slice,
// else into y.
template <typename T>
struct Results {
  float* sums;
  T* y;
  int64_t m;
  const JoinedMatrices& joined;
  int tile, matrix;

  // Of the tile that `column` of the block belongs to.
  __device__ Results(float* sums_, T* y_, int64_t m_, const JoinedMatrices& joined_, int column)
      : sums(sums_), y(y_), m(m_), joined(joined_), tile(blockIdx.y * (kOutputs / kTile) + column / kTile) {
    matrix = matrix_of_tile(joined, tile);
  }

  // `column` of the block.
  __device__ void store(int64_t row, int column, float sum) const {
    if (row >= m || tile >= joined.tiles) return;
    const int within = column % kTile;
    if (sums != nullptr) {
      const int64_t columns = static_cast<int64_t>(joined.tiles) * kTile;
      sums[(blockIdx.z * m + row) * columns + static_cast<int64_t>(tile) * kTile + within] = sum;
      return;
    }
    const int output = (tile - joined.first_tile[matrix]) * kTile + within;
    if (output >= joined.n[matrix]) return;
    y[row * joined.outputs + joined.first_output[matrix] + output] = from_float<T>(sum);
  }
};

inline __device__ float scale_of(const uint16_t* scales, int64_t group, const JoinedMatrices& joined, int column) {
  const int64_t columns = static_cast<int64_t>(joined.tiles) * kTile;
  const int64_t all = static_cast<int64_t>(blockIdx.y) * kOutputs + column;
  return all < columns ? to_float(scales[group * columns + all]) : 0.0f;
}

// ---- float16: mma.m16n8k16 of two neighbouring channels in a word. Codes and products are exact. A sum may be cut off
// where others round: an error of 2^-23 |x code| a channel, which is less than 2^-24 |x| (|code| + zero) of the
// definition.

constexpr int kPairs = 32;  // of channels, in a step
constexpr int kMmaPairs = 8;
constexpr int kWarpRows = 32, kWarpOutputs = 32;  // 2 x 4 warps
constexpr int kRowTiles = kWarpRows / 16, kOutputTiles = kWarpOutputs / 8;
constexpr uint32_t kHalf1024 = 0x6400;  // adding n < 1024 to the bits adds n to the number
constexpr uint32_t kHalfInfinity = 0x7c00, kHalfNan = 0x7e00;
static_assert((kRows / kWarpRows) * (kOutputs / kWarpOutputs) == kWarps, "the warps cover the tile");

// Strides that keep the fragments' reads in different banks.
struct alignas(16) MmaShared {
  uint32_t x[kRows][kPairs + 4];
  uint32_t codes[kPairs][kOutputs + 8];
};

// NaN for what is not finite: it makes every output NaN, whatever the code.
inline __device__ uint32_t finite_or_nan(uint16_t half) {
  return (half & kHalfInfinity) == kHalfInfinity ? kHalfNan : half;
}

inline __device__ void load_pairs(const uint16_t* x, int64_t k, int64_t m, int64_t first_row, int64_t channel,
                                  int count, int pairs, MmaShared& shared) {
  for (int i = threadIdx.x; i < kRows * kPairs; i += kThreads) {
    const int row = i / kPairs, pair = i % kPairs;
    if (pair >= pairs) continue;
    const uint16_t* from = x + (first_row + row) * k + channel + 2 * pair;
    const bool is_row = first_row + row < m;
    const uint32_t low = is_row && 2 * pair < count ? finite_or_nan(from[0]) : 0;
    const uint32_t high = is_row && 2 * pair + 1 < count ? finite_or_nan(from[1]) : 0;
    shared.x[row][pair] = low | high << 16;
  }
}

template <int kBits>
__device__ void load_code_pairs(const WeightColumns<kBits>& weights, int64_t channel, int count, int pairs,
                                MmaShared& shared) {
  using Form = Codes<kBits>;
  constexpr uint32_t kBoth = 0x10001;
  for (int i = threadIdx.x; i < kPairs * Form::kWords; i += kThreads) {
    const int pair = i / Form::kWords, word = i % Form::kWords;
    if (pair >= pairs) continue;
    const uint32_t low = 2 * pair < count ? weights.word(channel + 2 * pair, word) : 0;
    const uint32_t high = 2 * pair + 1 < count ? weights.word(channel + 2 * pair + 1, word) : 0;
    for (int plane = 0; plane < Form::kPlanes; ++plane) {
      const uint32_t raised = Form::raised(low, plane) | Form::raised(high, plane) << 16;
      shared.codes[pair][Form::output(word, plane)] =
          subtract_halves(kBoth * kHalf1024 | raised, kBoth * (kHalf1024 + Form::kZero));
    }
  }
}

// Block (64 rows, 128 outputs, slice). A lane's place in the fragments: row or output lane / 4, pair lane % 4.
template <int kBits>
__global__ void __launch_bounds__(kThreads, 2)
    nbits_gemm_half(const uint16_t* x, int64_t m, int64_t k, const uint8_t* w, const uint16_t* scales, int64_t group,
                    JoinedMatrices joined, float* sums, uint16_t* y) {
  QSK_SHARED(MmaShared, shared);
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows;
  const WeightColumns<kBits> weights = {w, static_cast<int64_t>(joined.tiles) * kTile * kBits / 8};
  const Groups groups = groups_of_slice(k, group);
  const int warp_row = warp_of_thread() % 2 * kWarpRows, warp_output = warp_of_thread() / 2 * kWarpOutputs;
  const int major = lane_of_thread() / 4, minor = lane_of_thread() % 4;
  float sum[kRowTiles][kOutputTiles][4] = {};
  for (int64_t number = groups.first; number < groups.last; ++number) {
    float piece[kRowTiles][kOutputTiles][4] = {};
    const int64_t end = groups.end(number);
    for (int64_t channel = number * group; channel < end; channel += 2 * kPairs) {
      const int count = end - channel < 2 * kPairs ? static_cast<int>(end - channel) : 2 * kPairs;
      const int pairs = (count + 2 * kMmaPairs - 1) / (2 * kMmaPairs) * kMmaPairs;
      load_pairs(x, k, m, first_row, channel, count, pairs, shared);
      load_code_pairs(weights, channel, count, pairs, shared);
      __syncthreads();
#pragma unroll 1  // else registers spill
      for (int pair = minor; pair < pairs; pair += kMmaPairs) {
        uint32_t a[kRowTiles][4], b[kOutputTiles][2];
        for (int i = 0; i < kRowTiles; ++i) {
          const int row = warp_row + 16 * i + major;
          a[i][0] = shared.x[row][pair];
          a[i][1] = shared.x[row + 8][pair];
          a[i][2] = shared.x[row][pair + 4];
          a[i][3] = shared.x[row + 8][pair + 4];
        }
        for (int j = 0; j < kOutputTiles; ++j) {
          const int output = warp_output + 8 * j + major;
          b[j][0] = shared.codes[pair][output];
          b[j][1] = shared.codes[pair + 4][output];
        }
        for (int i = 0; i < kRowTiles; ++i) {
          for (int j = 0; j < kOutputTiles; ++j) multiply_tiles(piece[i][j], a[i], b[j]);
        }
      }
      __syncthreads();
    }
    for (int j = 0; j < kOutputTiles; ++j) {
      for (int odd = 0; odd < 2; ++odd) {
        const float scale = scale_of(scales, number, joined, warp_output + 8 * j + 2 * minor + odd);
        for (int i = 0; i < kRowTiles; ++i) {
          sum[i][j][odd] += piece[i][j][odd] * scale;
          sum[i][j][2 + odd] += piece[i][j][2 + odd] * scale;
        }
      }
    }
  }
  const Results<uint16_t> results(sums, y, m, joined, warp_output);
#pragma unroll  // sums are registers
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kOutputTiles; ++j) {
#pragma unroll
      for (int each = 0; each < 4; ++each) {
        const int64_t row = first_row + warp_row + 16 * i + 8 * (each / 2) + major;
        results.store(row, warp_output + 8 * j + 2 * minor + each % 2, sum[i][j][each]);
      }
    }
  }
}

// ---- float32: a thread multiplies 8 rows by 4 outputs.

constexpr int kChannels = 32;  // of a step
constexpr int kThreadRows = kRows / kWarps, kThreadOutputs = kOutputs / kWarp;
static_assert(kThreadRows == 8 && kThreadOutputs == 4, "read as two float4 and as one");
constexpr uint32_t kFloat2To23 = 0x4b000000;  // adding n < 2^23 to the bits adds n to the number

struct alignas(16) FmaShared {
  float x[kChannels][kRows + 4];
  float codes[kChannels][kOutputs + 4];
};

inline __device__ void load_channels(const float* x, int64_t k, int64_t m, int64_t first_row, int64_t channel,
                                     int count, FmaShared& shared) {
  for (int i = threadIdx.x; i < kRows * kChannels; i += kThreads) {
    const int row = i / kChannels, of_step = i % kChannels;
    float value = first_row + row < m && of_step < count ? x[(first_row + row) * k + channel + of_step] : 0.0f;
    if (!is_finite(value)) value = not_a_number();
    shared.x[of_step][row] = value;
  }
}

template <int kBits>
__device__ void load_codes(const WeightColumns<kBits>& weights, int64_t channel, int count, FmaShared& shared) {
  using Form = Codes<kBits>;
  const float subtracted = __uint_as_float(kFloat2To23 | Form::kZero);
  for (int i = threadIdx.x; i < kChannels * Form::kWords; i += kThreads) {
    const int of_step = i / Form::kWords, word = i % Form::kWords;
    if (of_step >= count) continue;
    const uint32_t codes = weights.word(channel + of_step, word);
    for (int plane = 0; plane < Form::kPlanes; ++plane) {
      shared.codes[of_step][Form::output(word, plane)] =
          __uint_as_float(kFloat2To23 | Form::raised(codes, plane)) - subtracted;
    }
  }
}

inline __device__ void read_four(const float* from, float* to) {
  const float4 four = *reinterpret_cast<const float4*>(from);
  to[0] = four.x;
  to[1] = four.y;
  to[2] = four.z;
  to[3] = four.w;
}

// Block (64 rows, 128 outputs, slice). A warp has 8 rows, a lane four outputs.
template <int kBits>
__global__ void __launch_bounds__(kThreads, 2)
    nbits_gemm_float(const float* x, int64_t m, int64_t k, const uint8_t* w, const uint16_t* scales, int64_t group,
                     JoinedMatrices joined, float* sums, float* y) {
  QSK_SHARED(FmaShared, shared);
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows;
  const WeightColumns<kBits> weights = {w, static_cast<int64_t>(joined.tiles) * kTile * kBits / 8};
  const Groups groups = groups_of_slice(k, group);
  const int own_row = warp_of_thread() * kThreadRows, own_output = lane_of_thread() * kThreadOutputs;
  float sum[kThreadRows][kThreadOutputs] = {};
  for (int64_t number = groups.first; number < groups.last; ++number) {
    float piece[kThreadRows][kThreadOutputs] = {};
    const int64_t end = groups.end(number);
    for (int64_t channel = number * group; channel < end; channel += kChannels) {
      const int count = end - channel < kChannels ? static_cast<int>(end - channel) : kChannels;
      load_channels(x, k, m, first_row, channel, count, shared);
      load_codes(weights, channel, count, shared);
      __syncthreads();
      for (int of_step = 0; of_step < count; ++of_step) {
        float values[kThreadRows], codes[kThreadOutputs];
        read_four(&shared.x[of_step][own_row], values);
        read_four(&shared.x[of_step][own_row + 4], values + 4);
        read_four(&shared.codes[of_step][own_output], codes);
        for (int i = 0; i < kThreadRows; ++i) {
          for (int j = 0; j < kThreadOutputs; ++j) piece[i][j] += values[i] * codes[j];
        }
      }
      __syncthreads();
    }
    for (int j = 0; j < kThreadOutputs; ++j) {
      const float scale = scale_of(scales, number, joined, own_output + j);
      for (int i = 0; i < kThreadRows; ++i) sum[i][j] += piece[i][j] * scale;
    }
  }
  const Results<float> results(sums, y, m, joined, own_output);
#pragma unroll  // sums are registers
  for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
    for (int j = 0; j < kThreadOutputs; ++j) results.store(first_row + own_row + i, own_output + j, sum[i][j]);
  }
}

template <int kBits>
void enqueue(const NBitsProduct& product, int64_t slices, float* sums, const qsk_cuda_queue& queue) {
  const dim3 grid(static_cast<unsigned>(ceil_div(product.m, kRows)),
                  static_cast<unsigned>(ceil_div(product.joined.tiles, kOutputs / kTile)),
                  static_cast<unsigned>(slices));
  if (product.type == QSK_FLOAT16) {
    launch(nbits_gemm_half<kBits>, grid, queue.stream, static_cast<const uint16_t*>(product.x), product.m, product.k,
           product.w, product.scales, product.group, product.joined, sums, static_cast<uint16_t*>(product.y));
  } else {
    launch(nbits_gemm_float<kBits>, grid, queue.stream, static_cast<const float*>(product.x), product.m, product.k,
           product.w, product.scales, product.group, product.joined, sums, static_cast<float*>(product.y));
  }
}

}  // namespace

int64_t nbits_gemm_blocks(int64_t m, int64_t tiles) { return ceil_div(m, kRows) * ceil_div(tiles, kOutputs / kTile); }

void enqueue_nbits_gemm(const NBitsProduct& product, int64_t slices, float* sums, const qsk_cuda_queue& queue) {
  product.bits == 4 ? enqueue<4>(product, slices, sums, queue) : enqueue<8>(product, slices, sums, queue);
}

}  // namespace qsk_cuda
