// The seam between the driver of products in floating point and its kernels; see kernels.h for the rules of such files.
#ifndef QSK_SRC_FLOAT_KERNELS_H_
#define QSK_SRC_FLOAT_KERNELS_H_

#include <stdint.h>

namespace qsk {

enum WeightType { kFloat32Weights, kFloat16Weights, kInt8Weights, kInt4Weights, kWeightTypes };

// Some channels of one row of x, and where their weights are.
struct FloatRows {
  const uint8_t* w;
  int64_t row_bytes;
  const uint16_t* scales;       // float16 [outputs], of the group that all these channels belong to; integers only
  const int32_t* index;         // [count]
  const float* value;           // [count]
  int64_t count;                // 1..kFloatRows, for integers 1..kCodeRows
  const int32_t* next;          // [next_count] read soon: prefetch them
  int64_t next_count;           // at most kFloatRows
  const uint16_t* next_scales;  // as scales, of the first of them; NULL: none
  int32_t* partial;             // [outputs] workspace, aligned to 32; integers only
  int64_t outputs;              // of a row, with padding: a multiple of 64 for integer weights
};
// Rows that a kernel passes over at a time: with more streams than that, pages and hardware prefetchers run out (16
// rows take 1.1 times, 32 rows 1.5 times as long out of memory).
constexpr int64_t kFloatRows = 8;
constexpr int64_t kCodeRows = 256;  // 32-bit sums of 16-bit activations times codes hold no more

// The M > 1 path works on tiles of `channels` input channels times kFloatTileOutputs outputs, unpacked to panels of
// kFloatPanelOutputs: [panel][channel][kFloatPanelOutputs].
constexpr int64_t kFloatTileOutputs = 64;
constexpr int64_t kFloatPanelOutputs = 16;
constexpr int64_t kFloatTileChannels = 256;

struct FloatTile {
  const uint8_t* w;  // the tile's first byte in the row of its first channel
  int64_t row_bytes;
  const uint16_t* scales;  // of the tile's first output in the group of its first channel
  int64_t scales_stride;   // elements
  int64_t group;           // channels that share scales
  int64_t group_left;      // channels of the first group that are left, the first one included
  int64_t channels;        // at most kFloatTileChannels
  int64_t outputs;         // 1..kFloatTileOutputs, below that only for the last tile of float weights
};

// DenseMatMulNBits reads 32 bytes of codes at a step, that is so many inputs of one output.
template <int Bits>
constexpr int64_t kDenseStepInputs = 256 / Bits;

// The activations of a step as `dense` multiplies them: multiples of its unit, for the sixteen halves of its words by
// plane, and what the zero points of each word's codes add.
template <int Bits>
struct DenseStep {
  int16_t values[16 / Bits][16];
  int32_t offset[8];
};

constexpr int64_t kDenseBlockSteps = 4;  // whose eight halves are scaled at once

template <int Bits>
struct DenseBlock {
  DenseStep<Bits> steps[kDenseBlockSteps];
  float units[2 * kDenseBlockSteps];  // of the steps, twice
};

constexpr int64_t kDensePiece = 16;  // outputs whose scales are converted together

// Some outputs of a matrix that is read output by output.
struct DenseRows {
  const uint8_t* w;  // [outputs, row_bytes]
  int64_t row_bytes;
  const uint16_t* scales;  // float16 [outputs, scales_stride]
  int64_t scales_stride;
  int64_t group;  // inputs that share a scale
  float* wide;    // [kDensePiece * scales_stride + 15], workspace: whole vectors are read from any scale on
  int64_t outputs;
  int64_t steps;
  const void* x;  // [rows, blocks] DenseBlock
  int64_t rows;
  int64_t y_stride;
};

// What a channel of a row costs in the M > 1 paths, where `add` costs 1: `unpack` per channel, `multiply` per channel
// and row. Measured; docs/benchmarks.md has the figures.
struct FloatGemmCost {
  float unpack;
  float multiply;
};

struct FloatKernels {
  // sums[0 .. outputs) += value * weight over the channels.
  void (*add[kWeightTypes])(const FloatRows& rows, float* sums);
  // The weights of a tile as float32, zero beyond its outputs.
  void (*unpack[kWeightTypes])(const FloatTile& tile, float* panels);
  // sums[row * kFloatTileOutputs + .] += x[row * x_stride + channel] * panels over all channels and outputs of a tile.
  void (*multiply)(const float* panels, int64_t channels, const float* x, int64_t x_stride, int64_t rows, float* sums);
  // The positions and values of x that are not zero (NaN is not), in order; both outputs have room for n + 8 elements.
  int64_t (*compact)(const float* x, int64_t n, int32_t* index, float* value);
  // A finite row of x as [blocks] DenseBlock, aligned to 32; integers only.
  void (*lay_out_x[kWeightTypes])(const float* x, int64_t k, int64_t steps, void* laid_out);
  // y[row * y_stride + output] = the products; integers only.
  void (*dense[kWeightTypes])(const DenseRows& rows, float* y);
  FloatGemmCost cost[kWeightTypes];
};

extern const FloatKernels float_generic, float_avx2, float_neon;

}  // namespace qsk

#endif  // QSK_SRC_FLOAT_KERNELS_H_
