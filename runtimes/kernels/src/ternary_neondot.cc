// Ternary matmul, Advanced SIMD with the dot product (ARMv8.2: Cortex-A55, A75 and newer, Neoverse, Apple).
//
// sdot adds the four products of four channels to an int32 lane. In one row the four outputs of a byte are four planes;
// the planes 1 and 2 are masked without a shift, which multiplies their codes by 4 and 16 (still a signed byte), and
// divided exactly when a group of channels is done.
#include "ternary_neondot_gemv.h"

namespace qsk {
namespace {

int32x4_t dot(int32x4_t sum, uint8x16_t codes, int8x16_t q) { return vdotq_s32(sum, vreinterpretq_s8_u8(codes), q); }

}  // namespace

void ternary_neondot_gemv(const TernaryRows& given, int32_t* sums) {
  const int64_t row_bytes = given.row_bytes, count = given.count;
  const uint8_t* rows[kGemvRows];
  int8_t activations[kGemvRows] = {};
  memcpy(activations, given.value, count);
  const int64_t quad_count = (count + 3) / 4;
  for (int64_t i = 0; i < 4 * quad_count; ++i) {
    rows[i] = given.w + given.index[i < count ? i : count - 1] * row_bytes;
  }
  const uint8x16_t mask0 = vdupq_n_u8(0x03), mask1 = vdupq_n_u8(0x0c), mask2 = vdupq_n_u8(0x30);
  for (int64_t column = 0; column < row_bytes; column += kHalfBytes) {
    if (column % 64 == 0) {
      for (int64_t i = 0; i < given.next_count; ++i) __builtin_prefetch(given.w + given.next[i] * row_bytes + column);
    }
    int32x4_t products[4][4];  // [h][plane]
    for (auto& planes : products) {
      for (auto& plane : planes) plane = vdupq_n_s32(0);
    }
    for (int64_t i = 0; i < quad_count; ++i) {
      int32_t four;
      memcpy(&four, activations + 4 * i, sizeof four);
      const int8x16_t q = vreinterpretq_s8_s32(vdupq_n_s32(four));
      uint8x16_t bytes[4];
      interleave(rows + 4 * i, column, bytes);
      for (int h = 0; h < 4; ++h) {
        products[h][0] = dot(products[h][0], vandq_u8(bytes[h], mask0), q);
        products[h][1] = dot(products[h][1], vandq_u8(bytes[h], mask1), q);
        products[h][2] = dot(products[h][2], vandq_u8(bytes[h], mask2), q);
        products[h][3] = dot(products[h][3], vshrq_n_u8(bytes[h], 6), q);
      }
    }
    int32_t* half = sums + column / kHalfBytes * kHalfSums;
    for (int h = 0; h < 4; ++h) {
      add_to(half + 16 * h, products[h][0]);
      add_to(half + 16 * h + 4, vshrq_n_s32(products[h][1], 2));
      add_to(half + 16 * h + 8, vshrq_n_s32(products[h][2], 4));
      add_to(half + 16 * h + 12, products[h][3]);
    }
  }
}

namespace {

// Codes as [half][h][quad of channels][plane][16]: each 32-bit lane holds the four codes of one output.
void unpack(const TernaryTile& tile) {
  const uint8x16_t low = vdupq_n_u8(0x03);
  const int64_t quads = tile.weights.channels / 4;
  for (int64_t t = 0; t < quads; ++t) {
    const uint8_t* rows[4];
    for (int i = 0; i < 4; ++i) rows[i] = tile.weights.w + tile.weights.index[4 * t + i] * tile.row_bytes;
    for (int64_t column = 0; column < tile.bytes; column += kHalfBytes) {
      uint8x16_t bytes[4];
      interleave(rows, column, bytes);
      for (int h = 0; h < 4; ++h) {
        const int64_t panel = column / kHalfBytes * 4 + h;
        uint8_t* out = tile.workspace + (panel * quads + t) * 64;
        vst1q_u8(out, vandq_u8(bytes[h], low));
        vst1q_u8(out + 16, vandq_u8(vshrq_n_u8(bytes[h], 2), low));
        vst1q_u8(out + 32, vandq_u8(vshrq_n_u8(bytes[h], 4), low));
        vst1q_u8(out + 48, vshrq_n_u8(bytes[h], 6));
      }
    }
  }
}

// Rows x 16 outputs: the four planes of four row bytes.
template <int Rows>
void multiply(const uint8_t* panel, int64_t quads, const int8_t* q, int64_t q_stride, int32_t* sums) {
  int32x4_t products[Rows][4];
  QSK_UNROLL
  for (int r = 0; r < Rows; ++r) {
    QSK_UNROLL
    for (int p = 0; p < 4; ++p) products[r][p] = vld1q_s32(sums + r * kGemmSumsStride + 4 * p);
  }
  for (int64_t t = 0; t < quads; ++t) {
    const uint8x16_t codes[4] = {vld1q_u8(panel + 64 * t), vld1q_u8(panel + 64 * t + 16), vld1q_u8(panel + 64 * t + 32),
                                 vld1q_u8(panel + 64 * t + 48)};
    QSK_UNROLL
    for (int r = 0; r < Rows; ++r) {
      int32_t four;
      memcpy(&four, q + r * q_stride + 4 * t, sizeof four);
      const int8x16_t activations = vreinterpretq_s8_s32(vdupq_n_s32(four));
      QSK_UNROLL
      for (int p = 0; p < 4; ++p) products[r][p] = dot(products[r][p], codes[p], activations);
    }
  }
  QSK_UNROLL
  for (int r = 0; r < Rows; ++r) {
    QSK_UNROLL
    for (int p = 0; p < 4; ++p) vst1q_s32(sums + r * kGemmSumsStride + 4 * p, products[r][p]);
  }
}

void gemm(const TernaryTile& tile, int32_t* sums) {
  unpack(tile);
  const int64_t quads = tile.weights.channels / 4;
  const int64_t panels = tile.bytes / kHalfBytes * 4;
  for (int64_t first = 0; first < tile.rows; first += kGemmRowsAtOnce) {
    const int64_t end = first + kGemmRowsAtOnce < tile.rows ? first + kGemmRowsAtOnce : tile.rows;
    for (int64_t panel = 0; panel < panels; ++panel) {
      if (first == 0) prefetch_next_tile(tile, panel, panels);
      const uint8_t* codes = tile.workspace + panel * quads * 64;
      int64_t row = first;
      while (row < end) {
        const int8_t* q = tile.q + row * tile.q_stride;
        int32_t* out = sums + row * kGemmSumsStride + panel * 16;
        if (end - row >= 4) {
          multiply<4>(codes, quads, q, tile.q_stride, out);
          row += 4;
        } else {
          multiply<1>(codes, quads, q, tile.q_stride, out);
          row += 1;
        }
      }
    }
  }
}

}  // namespace

const TernaryKernels ternary_neondot = {32,    ternary_neondot_gemv, 1.0f, {{1.2f, 0.47f}, kGemmTile, gemm}, nullptr,
                                        finish};

}  // namespace qsk
