// The kernels of products in floating point, written once in terms of eight-lane vectors F8 (float) and U8 (uint32_t),
// which the including file defines for its instruction set together with their operations:
//   zero() splat(x) load(p) store(p, v) add(a, b) mul(a, b) fma(a, b, c)   load_half(p): 8 float16
//   nonzero(v): a bit per lane   pack_nonzero(v, first_index, bits, index, value): writes the chosen lanes, and may
//   write 8 elements
//   load_words(p) flip(v, bits) mask(v, bits) upper(v): v >> 16   to_float(v): values below 2^31
// All is in an anonymous namespace: every file compiles it with the flags of its own instruction set.
#ifndef QSK_SRC_FLOAT_ROWS_H_
#define QSK_SRC_FLOAT_ROWS_H_

#include <stdint.h>
#include <string.h>

#include "float_kernels.h"
#include "kernels.h"

namespace qsk {
namespace {

constexpr int64_t kLanes = 8;
constexpr int64_t kLineBytes = 64;
constexpr int kTileVectors = kFloatTileOutputs / kLanes;

// Planes of codes are masked where they stand: plane i comes out as code * 2^(bits * i), an exact float, and the power
// is divided out with the scale. The upper half of a word is moved down first, so that all values fit a signed int.
template <int Bits>
struct Codes {
  static constexpr int kPlanes = 32 / Bits;            // of a word
  static constexpr int kHalf = kPlanes / 2;            // of its lower 16 bits
  static constexpr uint32_t kCode = (1u << Bits) - 1;  // plane 0
  static constexpr uint32_t kSigns = Bits == 4 ? 0x88888888u : 0x80808080u;
  static constexpr float kZero = 1 << (Bits - 1);  // of a code whose sign bit is flipped
  static constexpr float factor(int plane) { return 1.0f / static_cast<float>(1 << (Bits * (plane % kHalf))); }
};

// Fetches one line of each of the rows that are read next.
inline void prefetch_line(const FloatRows& rows, int64_t byte) {
  for (int64_t i = 0; i < rows.next_count; ++i) {
    __builtin_prefetch(rows.w + rows.next[i] * rows.row_bytes + byte);
  }
}

struct Float32 {
  static constexpr int64_t kBytes = 4;
  static F8 eight(const uint8_t* p) { return load(reinterpret_cast<const float*>(p)); }
};
struct Float16 {
  static constexpr int64_t kBytes = 2;
  static F8 eight(const uint8_t* p) { return load_half(reinterpret_cast<const uint16_t*>(p)); }
};

// sums += over all rows, of `Vectors` vectors of outputs from `first` on.
template <typename Weight, int Vectors>
void add_floats_at(const FloatRows& rows, const uint8_t* const* row, int64_t first, float* sums) {
  F8 part[Vectors];
  QSK_UNROLL
  for (int v = 0; v < Vectors; ++v) part[v] = load(sums + first + v * kLanes);
  for (int64_t i = 0; i < rows.count; ++i) {
    const uint8_t* w = row[i] + first * Weight::kBytes;
    const F8 value = splat(rows.value[i]);
    QSK_UNROLL
    for (int v = 0; v < Vectors; ++v) part[v] = fma(value, Weight::eight(w + v * kLanes * Weight::kBytes), part[v]);
  }
  QSK_UNROLL
  for (int v = 0; v < Vectors; ++v) store(sums + first + v * kLanes, part[v]);
}

template <typename Weight>
void add_floats(const FloatRows& rows, float* sums) {
  const uint8_t* row[kFloatRows];
  for (int64_t i = 0; i < rows.count; ++i) row[i] = rows.w + rows.index[i] * rows.row_bytes;
  int64_t first = 0;
  for (; first + kFloatTileOutputs <= rows.outputs; first += kFloatTileOutputs) {
    for (int64_t byte = 0; byte < kFloatTileOutputs * Weight::kBytes; byte += kLineBytes) {
      prefetch_line(rows, first * Weight::kBytes + byte);
    }
    add_floats_at<Weight, kTileVectors>(rows, row, first, sums);
  }
  for (; first + kLanes <= rows.outputs; first += kLanes) add_floats_at<Weight, 1>(rows, row, first, sums);
  const int64_t left = rows.outputs - first;
  if (left == 0) return;
  uint8_t last[kLanes * 4] = {};
  float padded[kLanes] = {};
  memcpy(padded, sums + first, left * sizeof *sums);
  F8 part = load(padded);
  for (int64_t i = 0; i < rows.count; ++i) {
    memcpy(last, row[i] + first * Weight::kBytes, left * Weight::kBytes);
    part = fma(splat(rows.value[i]), Weight::eight(last), part);
  }
  store(padded, part);
  memcpy(sums + first, padded, left * sizeof *sums);
}

// Where output `output` of the channel `channel` goes in the panels of a tile.
inline float* panel_at(float* panels, int64_t channels, int64_t channel, int64_t output) {
  return panels + (output / kFloatPanelOutputs * channels + channel) * kFloatPanelOutputs + output % kFloatPanelOutputs;
}

template <int Bits>
void unpack_codes(const FloatTile& tile, float* panels) {
  using C = Codes<Bits>;
  constexpr int kWordGroups = kTileVectors / C::kPlanes;
  F8 scale[kTileVectors], offset[kTileVectors];
  const uint16_t* scales = tile.scales;
  int64_t left = 0;
  for (int64_t c = 0; c < tile.channels; ++c) {
    if (left == 0) {
      for (int v = 0; v < kTileVectors; ++v) {
        const F8 of_group = load_half(scales + v * kLanes);
        scale[v] = fma(of_group, splat(C::factor(v % C::kPlanes)), zero());
        offset[v] = fma(of_group, splat(-C::kZero), zero());
      }
      scales += tile.scales_stride;
      left = c == 0 ? tile.group_left : tile.group;
    }
    --left;
    const uint8_t* row = tile.w + c * tile.row_bytes;
    for (int g = 0; g < kWordGroups; ++g) {
      const U8 flipped = flip(load_words(row + g * 32), C::kSigns);
      const U8 halves[2] = {flipped, upper(flipped)};
      for (int p = 0; p < C::kPlanes; ++p) {
        const int v = g * C::kPlanes + p;
        const F8 code = to_float(mask(halves[p / C::kHalf], C::kCode << (Bits * (p % C::kHalf))));
        store(panel_at(panels, tile.channels, c, v * kLanes), fma(code, scale[v], offset[v]));
      }
    }
  }
}

template <typename Weight>
void unpack_floats(const FloatTile& tile, float* panels) {
  for (int64_t c = 0; c < tile.channels; ++c) {
    const uint8_t* row = tile.w + c * tile.row_bytes;
    uint8_t padded[kFloatTileOutputs * 4];
    if (tile.outputs < kFloatTileOutputs) {
      memset(padded, 0, sizeof padded);
      memcpy(padded, row, tile.outputs * Weight::kBytes);
      row = padded;
    }
    for (int v = 0; v < kTileVectors; ++v) {
      store(panel_at(panels, tile.channels, c, v * kLanes), Weight::eight(row + v * kLanes * Weight::kBytes));
    }
  }
}

template <int Rows>
void multiply_rows(const float* panel, int64_t channels, const float* x, int64_t x_stride, float* sums) {
  F8 a[Rows], b[Rows];
  QSK_UNROLL
  for (int r = 0; r < Rows; ++r) {
    a[r] = load(sums + r * kFloatTileOutputs);
    b[r] = load(sums + r * kFloatTileOutputs + kLanes);
  }
  for (int64_t c = 0; c < channels; ++c) {
    const F8 w0 = load(panel + c * kFloatPanelOutputs), w1 = load(panel + c * kFloatPanelOutputs + kLanes);
    QSK_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const F8 value = splat(x[r * x_stride + c]);
      a[r] = fma(value, w0, a[r]);
      b[r] = fma(value, w1, b[r]);
    }
  }
  QSK_UNROLL
  for (int r = 0; r < Rows; ++r) {
    store(sums + r * kFloatTileOutputs, a[r]);
    store(sums + r * kFloatTileOutputs + kLanes, b[r]);
  }
}

void multiply(const float* panels, int64_t channels, const float* x, int64_t x_stride, int64_t rows, float* sums) {
  for (int64_t output = 0; output < kFloatTileOutputs; output += kFloatPanelOutputs) {
    const float* panel = panels + output * channels;
    float* out = sums + output;
    int64_t row = 0;
    for (; row + 6 <= rows; row += 6) {
      multiply_rows<6>(panel, channels, x + row * x_stride, x_stride, out + row * kFloatTileOutputs);
    }
    for (; row + 2 <= rows; row += 2) {
      multiply_rows<2>(panel, channels, x + row * x_stride, x_stride, out + row * kFloatTileOutputs);
    }
    if (row < rows) multiply_rows<1>(panel, channels, x + row * x_stride, x_stride, out + row * kFloatTileOutputs);
  }
}

int64_t compact(const float* x, int64_t n, int32_t* index, float* value) {
  int64_t count = 0, i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const F8 v = load(x + i);
    const unsigned bits = nonzero(v);
    pack_nonzero(v, static_cast<int32_t>(i), bits, index + count, value + count);
    count += __builtin_popcount(bits);
  }
  for (; i < n; ++i) {
    if (x[i] == 0.0f) continue;
    index[count] = static_cast<int32_t>(i);
    value[count++] = x[i];
  }
  return count;
}

}  // namespace
}  // namespace qsk

#endif  // QSK_SRC_FLOAT_ROWS_H_
