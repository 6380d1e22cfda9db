// The seams between the drivers (one per op) and the kernels (one file per op and instruction set).
//
// Kernel files are compiled with the flags of their instruction set: they include no C++ library header with inline
// code, or the linker could pick such a copy for a processor that lacks it.
#ifndef QSK_SRC_KERNELS_H_
#define QSK_SRC_KERNELS_H_

#include <stdint.h>

#include "float_kernels.h"
#include "layer_kernels.h"
#include "qsk/variant.h"

// Unrolls the loop that follows, so that its array of vectors becomes registers: left alone, GCC keeps sums of six rows
// in memory, at half the speed.
#if defined(__clang__)
#define QSK_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define QSK_UNROLL _Pragma("GCC unroll 16")
#else
#define QSK_UNROLL
#endif

namespace qsk {

struct HalfKernels {
  void (*to_float)(const uint16_t* x, int64_t n, float* y);
  void (*from_float)(const float* x, int64_t n, uint16_t* y);  // to nearest even
};

// Bits of +inf: a magnitude's bits above it are a NaN.
constexpr uint32_t kInfinityBits = 0x7f800000u;
constexpr uint32_t kMagnitudeBits = 0x7fffffffu;

// Where a selection cuts the quantised magnitudes of a row: |q| >= least is kept, but `excess` of those with
// |q| == least are too many. least = 0: nothing that is not 0 already need go.
struct QuantizedCut {
  int32_t least;
  int64_t excess;
};

// What is left of a row.
struct Tally {
  int32_t sum;     // of q
  int32_t active;  // q that are not 0
};

struct QuantizeKernels {
  // The largest bits of |x|, 0 for n = 0. Magnitudes compare like their bits.
  uint32_t (*largest_magnitude)(const float* x, int64_t n);
  // q = clip(rint(inverse * x)). x is finite.
  void (*quantize)(const float* x, int64_t n, float inverse, int8_t* q);
  // The rest reads q up to the next multiple of 32 beyond n, whatever is there, and no q is -128.
  // The largest `least` that at least k of the |q| reach, and by how many they are more than k. 0 < k <= n.
  QuantizedCut (*cut)(const int8_t* q, int64_t n, int64_t k);
  // The positions where |q| == magnitude > 0, in order. Returns how many.
  int64_t (*find)(const int8_t* q, int64_t n, int32_t magnitude, int32_t* position);
  // q = 0 where |q| < least, for least >= 1.
  Tally (*drop_below)(int8_t* q, int64_t n, int32_t least);
  // The positions and values where |q| >= least, for least >= 1, in order; q is zero beyond n, and both outputs have
  // room for n + 32.
  Tally (*compact)(const int8_t* q, int64_t n, int32_t least, int32_t* index, int8_t* value);
};

// What a selection keeps: every key above `threshold`, and the first `ties` keys that equal it. A key is the bits of
// |x|, capped at those of +inf so that NaN ranks as +inf.
struct TopKCut {
  uint32_t threshold;
  int64_t ties;
};

constexpr int64_t kSelectBytes = 4;
constexpr int64_t kSelectSlack = 256;

struct TopKKernels {
  // 0 < k < n. Scratch: kSelectBytes per element and kSelectSlack more, aligned to 64.
  TopKCut (*select)(const float* x, int64_t n, int64_t k, void* scratch);
  void (*keep)(const float* x, int64_t n, TopKCut cut, float* y);
};

// The M > 1 paths work on tiles: some of the input channels times some of the outputs times some of the rows of x.
struct TileShape {
  int64_t bytes;        // of a row of weights, four outputs each: at most
  int64_t channels;     // at most
  int64_t row_group;    // rows of x are taken in groups of so many, a last, smaller one at the cost of a whole one
  int64_t sums_stride;  // of rows of sums
};

// Tiles of a GEMM, whose weights are unpacked once.
constexpr int64_t kGemmTileBytes = 64;
constexpr int64_t kGemmTileOutputs = 4 * kGemmTileBytes;
constexpr int64_t kGemmSumsStride = kGemmTileOutputs + 16;  // of rows of sums: not all in the same sets of the cache
constexpr int64_t kGemmTileChannels = 256;
constexpr int64_t kGemmChannelGroup = 8;  // a tile's channels are a multiple of it; those that fill up have q = 0
constexpr int64_t kGemmTileRows = 128;    // at most, in tiles of every shape
constexpr int64_t kGemmPanelGap = 64;     // between panels of codes, at most
constexpr int64_t kGemmMostPanels = 16;   // of a tile
constexpr int64_t kGemmCodesBytes = kGemmTileOutputs * kGemmTileChannels + kGemmMostPanels * kGemmPanelGap;
constexpr TileShape kGemmTile = {kGemmTileBytes, kGemmTileChannels, 1, kGemmSumsStride};

// Tiles whose products are looked up: sixteen rows of x at a time, for which tables of the sums of some channels are
// made, that many outputs read.
constexpr int64_t kTableRows = 16;
constexpr int64_t kTableChannels = 32;  // of which the tables are there at a time
constexpr int64_t kTableTileOutputs = 1024;
constexpr int64_t kTableMostGroups = kGemmTileRows / kTableRows;
constexpr int64_t kTableWorkspaceBytes =
    (48 << 10) + kTableMostGroups * kTableTileOutputs * kTableRows * static_cast<int64_t>(sizeof(int16_t));
constexpr TileShape kTableTile = {kTableTileOutputs / 4, INT64_MAX, kTableRows, kTableTileOutputs + 16};

// The weights of a tile: the same bytes of some channels' rows.
struct TileWeights {
  const uint8_t* w;      // the tile's first byte in row 0
  const int32_t* index;  // the channels
  int64_t channels;      // as many as the tile's shape allows
};

struct TernaryTile {
  TileWeights weights;  // channels: a multiple of kGemmChannelGroup
  TileWeights next;     // of the tile that comes after this one; 0 channels: none
  int64_t row_bytes;    // stride of w
  int64_t bytes;        // of a row in this tile: a multiple of 32, as many as its shape allows
  const int8_t* q;      // [rows, channels], the activations of these channels
  int64_t q_stride;
  int64_t rows;        // at most kGemmTileRows
  uint8_t* workspace;  // kGemmCodesBytes, or for tables kTableWorkspaceBytes; aligned to 64
};

// Rows that pass all of a tile's panels together: their activations take a small part of the first-level cache, and lie
// on few pages.
constexpr int64_t kGemmRowsAtOnce = 12;

// A tile reads one line of every channel's row, which no hardware prefetcher follows: fetches the `part`-th of `parts`
// of the next tile's lines into the second-level cache.
inline void prefetch_next_tile(const TernaryTile& tile, int64_t part, int64_t parts) {
  const TileWeights& next = tile.next;
  const int64_t end = next.channels * (part + 1) / parts;
  for (int64_t i = next.channels * part / parts; i < end; ++i) {
    __builtin_prefetch(next.w + next.index[i] * tile.row_bytes, 0, 2);
  }
}

// What the M > 1 paths cost beside `gemv`, whose time per channel and row is 1: `unpack` per channel, `multiply` per
// channel and row. Measured or, where noted, counted in instructions; docs/benchmarks.md has the figures.
struct GemmCost {
  float unpack;
  float multiply;
};

struct TernaryGemm {
  GemmCost cost;
  TileShape shape;
  // sums[row * shape.sums_stride + .] += q * code over the tile.
  void (*multiply)(const TernaryTile& tile, int32_t* sums);
};

// Some active channels of one row of x, and where their weights are.
struct TernaryRows {
  const uint8_t* w;
  int64_t row_bytes;
  const int32_t* index;  // [count]
  const int8_t* value;   // [count]
  int64_t count;         // 0..kGemvRows
  const int32_t* next;   // [next_count] read soon: prefetch them
  int64_t next_count;    // at most kGemvRows
  bool is_cached;        // another row of x has just read these weights
  int16_t* partial;      // workspace: one for each of the sums, aligned to 64
  // A variant whose sums are int16 at first may leave them in `partial` from call to call, where the caller sees to it
  // that those of more than one call stay within kMostMagnitude: the first of such calls begins them, the last one
  // moves them on.
  bool begins, ends;
};

// Of the activations: at most 2 * 4 of it is the magnitude of an int16 sum of products with codes 0..2, times 4.
constexpr int32_t kMostMagnitude = 32767 / (2 * 4);

struct TernaryKernels {
  // Sums are kept for whole blocks of this many row bytes, four int32 per byte, in the kernel's own order; 32 or 64.
  int64_t block_bytes;
  // sums[.] += value * code over the channels; what is in `partial`, when rows.ends says so.
  void (*gemv)(const TernaryRows& rows, int32_t* sums);
  float batch_cost;  // of a channel of a row of several that take turns; in the unit of GemmCost
  TernaryGemm gemm;
  const TernaryGemm* tables;  // for many rows; NULL: none
  // y[i] = float(sum over parts of the sums of output begin + i, less offset) * factor for i in 0..n-1. `begin` is a
  // multiple of kGemmTileOutputs.
  void (*finish)(const int32_t* const* parts, int64_t part_count, int64_t begin, int64_t n, int32_t offset,
                 float factor, float* y);
};

// Channels per call of `gemv`: int16 sums of 32 x4-scaled products just fit.
constexpr int64_t kGemvRows = 32;

extern const HalfKernels half_generic, half_f16c, half_neon;
extern const QuantizeKernels quantize_generic, quantize_avx2, quantize_neon;
extern const TopKKernels topk_generic, topk_avx2, topk_neon;
extern const TernaryGemm ternary_tables_avx2;
extern const TernaryKernels ternary_generic, ternary_avx2, ternary_avxvnni, ternary_avx512vnni;
extern const TernaryKernels ternary_neon, ternary_neondot, ternary_neoni8mm;

}  // namespace qsk

struct qsk_variant {
  const char* name;
  bool (*is_supported)();  // nullptr: not compiled for this architecture
  const qsk::HalfKernels* half;
  const qsk::QuantizeKernels* quantize;
  const qsk::TopKKernels* topk;
  const qsk::TernaryKernels* ternary;
  const qsk::FloatKernels* floats;
  const qsk::LayerKernels* layer;
};

namespace qsk {

// `variant`, or for NULL the chosen one; an error status when there is none.
int resolve_variant(const qsk_variant** variant);

}  // namespace qsk

#endif  // QSK_SRC_KERNELS_H_
