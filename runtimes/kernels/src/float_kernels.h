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
  const uint16_t* scales;  // float16 [outputs], of the group that all these channels belong to; integers only
  const int32_t* index;    // [count]
  const float* value;      // [count]
  int64_t count;           // 1..kFloatRows
  const int32_t* next;     // [next_count] read soon: prefetch them
  int64_t next_count;
  int64_t outputs;  // of a row, with padding: a multiple of 64 for integer weights
};
constexpr int64_t kFloatRows = 32;

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

// Some outputs of a matrix that is read output by output (DenseMatMulNBits), and the rows of x, laid out by the driver:
// step by step of 32 bytes of codes, plane i of word j being input j * planes + i of the step.
struct DenseRows {
  const uint8_t* w;  // [outputs, row_bytes]
  int64_t row_bytes;
  const uint16_t* scales;  // float16 [outputs, scales_stride]
  int64_t scales_stride;
  int64_t group;  // inputs that share a scale
  int64_t outputs;
  int64_t steps;
  const float* planes;  // [rows, planes_stride]: x by step, plane and lane, divided by what the codes' place multiplies
  int64_t planes_stride;
  const float* offsets;  // [rows, offsets_stride]: by step and lane, minus zero point times the sum of x
  int64_t offsets_stride;
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
  // y[row * y_stride + output] = the products; integers only.
  void (*dense[kWeightTypes])(const DenseRows& rows, float* y);
  FloatGemmCost cost[kWeightTypes];
};

extern const FloatKernels float_generic, float_avx2, float_neon;

}  // namespace qsk

#endif  // QSK_SRC_FLOAT_KERNELS_H_
