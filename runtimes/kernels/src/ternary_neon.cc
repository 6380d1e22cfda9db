// Ternary matmul, Advanced SIMD without the dot product (ARMv8.0: Cortex-A53, A57, A72).
//
// smlal adds int8 products to int16 lanes, one channel at a time: no interleaving. In one row the four outputs of a
// byte are four planes; plane 1 is masked without a shift, which multiplies its codes by 4, and divided exactly when a
// group of channels is done: 8 * 128 * 32 channels = 32768 below zero, less above, just fits.
#include "ternary_neon_finish.h"

namespace qsk {
namespace {

// Widens 8 int16 sums of row bytes h, h + 1 of one plane.
void widen_add(int32_t* sums, int16x8_t v) {
  add_to(sums, vmovl_s16(vget_low_s16(v)));
  add_to(sums + 16, vmovl_high_s16(v));
}

void gemv(const TernaryRows& given, int32_t* sums) {
  const int64_t row_bytes = given.row_bytes;
  const uint8_t* rows[kGemvRows];
  for (int64_t i = 0; i < given.count; ++i) rows[i] = given.w + given.index[i] * row_bytes;
  const uint8x16_t low = vdupq_n_u8(0x03), high = vdupq_n_u8(0x0c);
  for (int64_t column = 0; column < row_bytes; column += kHalfBytes) {
    if (column % 64 == 0) {
      for (int64_t i = 0; i < given.next_count; ++i) __builtin_prefetch(given.w + given.next[i] * row_bytes + column);
    }
    int16x8_t lower[4], upper[4];  // of the bytes 0..7 and 8..15
    for (int p = 0; p < 4; ++p) lower[p] = upper[p] = vdupq_n_s16(0);
    for (int64_t i = 0; i < given.count; ++i) {
      const uint8x16_t bytes = vld1q_u8(rows[i] + column);
      const uint8x16_t codes[4] = {vandq_u8(bytes, low), vandq_u8(bytes, high), vandq_u8(vshrq_n_u8(bytes, 4), low),
                                   vshrq_n_u8(bytes, 6)};
      const int8x16_t q = vdupq_n_s8(given.value[i]);
      for (int p = 0; p < 4; ++p) {
        lower[p] = vmlal_s8(lower[p], vreinterpret_s8_u8(vget_low_u8(codes[p])), vget_low_s8(q));
        upper[p] = vmlal_high_s8(upper[p], vreinterpretq_s8_u8(codes[p]), q);
      }
    }
    lower[1] = vshrq_n_s16(lower[1], 2);
    upper[1] = vshrq_n_s16(upper[1], 2);
    int32_t* half = sums + column / kHalfBytes * kHalfSums;
    for (int p = 0; p < 4; ++p) {
      widen_add(half + 4 * p, lower[p]);
      widen_add(half + 32 + 4 * p, upper[p]);
    }
  }
}

// Codes as [half][plane][channel][16 row bytes].
void unpack(const TernaryTile& tile) {
  const uint8x16_t low = vdupq_n_u8(0x03);
  const int64_t plane_bytes = tile.weights.channels * kHalfBytes;
  for (int64_t c = 0; c < tile.weights.channels; ++c) {
    const uint8_t* row = tile.weights.w + tile.weights.index[c] * tile.row_bytes;
    for (int64_t column = 0; column < tile.bytes; column += kHalfBytes) {
      const uint8x16_t bytes = vld1q_u8(row + column);
      uint8_t* out = tile.workspace + column / kHalfBytes * 4 * plane_bytes + c * kHalfBytes;
      vst1q_u8(out, vandq_u8(bytes, low));
      vst1q_u8(out + plane_bytes, vandq_u8(vshrq_n_u8(bytes, 2), low));
      vst1q_u8(out + 2 * plane_bytes, vandq_u8(vshrq_n_u8(bytes, 4), low));
      vst1q_u8(out + 3 * plane_bytes, vshrq_n_u8(bytes, 6));
    }
  }
}

// Rows x 16 outputs (one plane of 16 row bytes) over up to 128 channels: 2 * 128 * 128 = 32768 below zero, less above.
constexpr int64_t kMultiplyChannels = 128;

template <int Rows>
void multiply(const uint8_t* codes, int64_t channels, const int8_t* q, int64_t q_stride, int32_t* sums) {
  int16x8_t lower[Rows], upper[Rows];
  QSK_UNROLL
  for (int r = 0; r < Rows; ++r) lower[r] = upper[r] = vdupq_n_s16(0);
  for (int64_t c = 0; c < channels; ++c) {
    const int8x16_t bytes = vreinterpretq_s8_u8(vld1q_u8(codes + c * kHalfBytes));
    QSK_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const int8x16_t activation = vdupq_n_s8(q[r * q_stride + c]);
      lower[r] = vmlal_s8(lower[r], vget_low_s8(bytes), vget_low_s8(activation));
      upper[r] = vmlal_high_s8(upper[r], bytes, activation);
    }
  }
  QSK_UNROLL
  for (int r = 0; r < Rows; ++r) {
    widen_add(sums + r * kGemmSumsStride, lower[r]);
    widen_add(sums + r * kGemmSumsStride + 32, upper[r]);
  }
}

// Rows first..end-1 of one panel, over `channels` channels.
void multiply_rows(const TernaryTile& tile, const uint8_t* codes, int64_t begin, int64_t channels, int64_t first,
                   int64_t end, int32_t* sums) {
  int64_t row = first;
  while (row < end) {
    const int8_t* q = tile.q + row * tile.q_stride + begin;
    int32_t* out = sums + row * kGemmSumsStride;
    const int64_t left = end - row;
    if (left >= 8) {
      multiply<8>(codes, channels, q, tile.q_stride, out);
      row += 8;
    } else if (left >= 4) {
      multiply<4>(codes, channels, q, tile.q_stride, out);
      row += 4;
    } else {
      multiply<1>(codes, channels, q, tile.q_stride, out);
      row += 1;
    }
  }
}

void gemm(const TernaryTile& tile, int32_t* sums) {
  unpack(tile);
  const int64_t panels = tile.bytes / kHalfBytes * 4, tile_channels = tile.weights.channels;
  for (int64_t first = 0; first < tile.rows; first += kGemmRowsAtOnce) {
    const int64_t end = first + kGemmRowsAtOnce < tile.rows ? first + kGemmRowsAtOnce : tile.rows;
    for (int64_t panel = 0; panel < panels; ++panel) {
      if (first == 0) prefetch_next_tile(tile, panel, panels);
      for (int64_t begin = 0; begin < tile_channels; begin += kMultiplyChannels) {
        const int64_t left = tile_channels - begin;
        const uint8_t* codes = tile.workspace + (panel * tile_channels + begin) * kHalfBytes;
        multiply_rows(tile, codes, begin, left < kMultiplyChannels ? left : kMultiplyChannels, first, end,
                      sums + panel / 4 * kHalfSums + panel % 4 * 4);
      }
    }
  }
}

}  // namespace

const TernaryKernels ternary_neon = {32, gemv, 1.0f, {{1.1f, 0.75f}, kGemmTile, gemm}, nullptr, finish};

}  // namespace qsk
