// Ternary matmul, Advanced SIMD with int8 matrix products (ARMv8.6: Neoverse V1 and N2, Cortex-A510 and A710, Apple
// M2).
//
// smmla multiplies two outputs' codes of eight channels by two rows' activations of them: 2 x 2 int32 sums, twice the
// products of sdot. One row has no use for it and takes neondot's kernel.
#include "ternary_neondot_gemv.h"

namespace qsk {
namespace {

// Eight channels' bytes as [half][h][group of channels][plane][pair 0..1]: a vector holds the codes of two outputs,
// each of eight channels; the row bytes 4 h + 2 pair and the next, of a half.
constexpr int64_t kGroupBytes = 128;

void unpack(const TernaryTile& tile) {
  const uint8x16_t low = vdupq_n_u8(0x03);
  const int64_t groups = tile.weights.channels / 8;
  for (int64_t t = 0; t < groups; ++t) {
    const uint8_t* rows[8];
    for (int i = 0; i < 8; ++i) rows[i] = tile.weights.w + tile.weights.index[8 * t + i] * tile.row_bytes;
    for (int64_t column = 0; column < tile.bytes; column += kHalfBytes) {
      uint8x16_t first[4], second[4];  // channels 0..3 and 4..7: 32-bit lanes
      interleave(rows, column, first);
      interleave(rows + 4, column, second);
      for (int h = 0; h < 4; ++h) {
        const uint32x4_t a = vreinterpretq_u32_u8(first[h]), b = vreinterpretq_u32_u8(second[h]);
        const uint8x16_t bytes[2] = {vreinterpretq_u8_u32(vzip1q_u32(a, b)), vreinterpretq_u8_u32(vzip2q_u32(a, b))};
        const int64_t panel = column / kHalfBytes * 4 + h;
        uint8_t* out = tile.workspace + (panel * groups + t) * kGroupBytes;
        for (int pair = 0; pair < 2; ++pair) {
          vst1q_u8(out + 16 * pair, vandq_u8(bytes[pair], low));
          vst1q_u8(out + 16 * pair + 32, vandq_u8(vshrq_n_u8(bytes[pair], 2), low));
          vst1q_u8(out + 16 * pair + 64, vandq_u8(vshrq_n_u8(bytes[pair], 4), low));
          vst1q_u8(out + 16 * pair + 96, vshrq_n_u8(bytes[pair], 6));
        }
      }
    }
  }
}

int8x16_t two_rows(const int8_t* first, const int8_t* second) { return vcombine_s8(vld1_s8(first), vld1_s8(second)); }

// 2 * Pairs rows x 16 outputs: the four planes of four row bytes. `last` is the last row that counts: of a pair with a
// row beyond it, the second is that row again, and its sums are dropped.
template <int Pairs>
void multiply(const uint8_t* panel, int64_t groups, const int8_t* q, int64_t q_stride, int64_t last, int32_t* sums) {
  int32x4_t products[Pairs][4][2];  // [plane][pair of row bytes]; a vector: output 0 of both rows, output 1 of both
  const int8_t* rows[2 * Pairs];
  QSK_UNROLL
  for (int r = 0; r < Pairs; ++r) {
    rows[2 * r] = q + 2 * r * q_stride;
    rows[2 * r + 1] = q + (2 * r + 1 <= last ? 2 * r + 1 : last) * q_stride;
    QSK_UNROLL
    for (int p = 0; p < 4; ++p) products[r][p][0] = products[r][p][1] = vdupq_n_s32(0);
  }
  for (int64_t t = 0; t < groups; ++t) {
    const int8_t* codes = reinterpret_cast<const int8_t*>(panel) + t * kGroupBytes;
    int8x16_t activations[Pairs];
    QSK_UNROLL
    for (int r = 0; r < Pairs; ++r) activations[r] = two_rows(rows[2 * r] + 8 * t, rows[2 * r + 1] + 8 * t);
    QSK_UNROLL
    for (int p = 0; p < 4; ++p) {
      const int8x16_t codes0 = vld1q_s8(codes + 32 * p), codes1 = vld1q_s8(codes + 32 * p + 16);
      QSK_UNROLL
      for (int r = 0; r < Pairs; ++r) {
        products[r][p][0] = vmmlaq_s32(products[r][p][0], codes0, activations[r]);
        products[r][p][1] = vmmlaq_s32(products[r][p][1], codes1, activations[r]);
      }
    }
  }
  QSK_UNROLL
  for (int r = 0; r < Pairs; ++r) {
    int32_t* const out = sums + 2 * r * kGemmSumsStride;
    QSK_UNROLL
    for (int p = 0; p < 4; ++p) {
      add_to(out + 4 * p, vuzp1q_s32(products[r][p][0], products[r][p][1]));
      if (2 * r + 1 <= last) {
        add_to(out + kGemmSumsStride + 4 * p, vuzp2q_s32(products[r][p][0], products[r][p][1]));
      }
    }
  }
}

void gemm(const TernaryTile& tile, int32_t* sums) {
  static_assert(kGemmChannelGroup % 8 == 0, "groups of channels");
  unpack(tile);
  const int64_t groups = tile.weights.channels / 8;
  const int64_t panels = tile.bytes / kHalfBytes * 4;
  for (int64_t first = 0; first < tile.rows; first += kGemmRowsAtOnce) {
    const int64_t end = first + kGemmRowsAtOnce < tile.rows ? first + kGemmRowsAtOnce : tile.rows;
    for (int64_t panel = 0; panel < panels; ++panel) {
      if (first == 0) prefetch_next_tile(tile, panel, panels);
      const uint8_t* codes = tile.workspace + panel * groups * kGroupBytes;
      int64_t row = first;
      while (row < end) {
        const int8_t* q = tile.q + row * tile.q_stride;
        int32_t* out = sums + row * kGemmSumsStride + panel * 16;
        const int64_t last = end - row - 1;
        if (last >= 2) {
          multiply<2>(codes, groups, q, tile.q_stride, last, out);
          row += 4;
        } else {
          multiply<1>(codes, groups, q, tile.q_stride, last, out);
          row += 2;
        }
      }
    }
  }
}

}  // namespace

const TernaryKernels ternary_neoni8mm = {32,    ternary_neondot_gemv, 1.0f, {{1.0f, 0.29f}, kGemmTile, gemm}, nullptr,
                                         finish};

}  // namespace qsk
