// What the variants avx2 and avxvnni share: the order of sums, the codes of a tile and the way back to natural order.
//
// Order of sums: [block of 32 row bytes][h 0..3][plane p 0..3][8], where lane 4 l + i of a vector belongs to the row
// byte j = 16 l + 4 h + i of the block, and so to the output 4 j + p: the order in which unpacklo/unpackhi leave them.
#ifndef QSK_SRC_TERNARY_AVX2_LAYOUT_H_
#define QSK_SRC_TERNARY_AVX2_LAYOUT_H_

#include <immintrin.h>
#include <string.h>

#include "kernels.h"

namespace qsk {
namespace {

constexpr int64_t kBlockBytes = 32;
constexpr int64_t kLineBytes = 64;  // of the cache
constexpr int64_t kBlockSums = 4 * kBlockBytes;
constexpr int64_t kVectorSums = 8;

inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

inline void add_to(int32_t* sums, __m256i v) { store(sums, _mm256_add_epi32(load(sums), v)); }

template <_mm_hint kHint>
inline void prefetch(const uint8_t* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p), kHint);
}

// Panels start a line further than their contents need: 4096 bytes apart, all of them would share one set of the cache.
inline int64_t panel_bytes(int64_t quads) { return quads * 64 + kGemmPanelGap; }

// Four channels' bytes as [panel of two vectors][quad of channels][two vectors]: each 32-bit lane holds the four codes
// of one output, in the order of the sums.
inline void unpack(const TernaryTile& tile) {
  const int64_t quads = tile.weights.channels / 4;
  const __m256i low = _mm256_set1_epi8(0x03);
  for (int64_t t = 0; t < quads; ++t) {
    const uint8_t* rows[4];
    for (int i = 0; i < 4; ++i) rows[i] = tile.weights.w + tile.weights.index[4 * t + i] * tile.row_bytes;
    for (int64_t column = 0; column < tile.bytes; column += kBlockBytes) {
      const __m256i a = load(rows[0] + column), b = load(rows[1] + column);
      const __m256i c = load(rows[2] + column), d = load(rows[3] + column);
      const __m256i ab0 = _mm256_unpacklo_epi8(a, b), ab1 = _mm256_unpackhi_epi8(a, b);
      const __m256i cd0 = _mm256_unpacklo_epi8(c, d), cd1 = _mm256_unpackhi_epi8(c, d);
      const __m256i bytes[4] = {_mm256_unpacklo_epi16(ab0, cd0), _mm256_unpackhi_epi16(ab0, cd0),
                                _mm256_unpacklo_epi16(ab1, cd1), _mm256_unpackhi_epi16(ab1, cd1)};
      for (int h = 0; h < 4; ++h) {
        const int64_t panel = column / kBlockBytes * 8 + 2 * h;  // the planes 0 and 1; then 2 and 3
        uint8_t* out = tile.workspace + panel * panel_bytes(quads) + t * 64;
        store(out, _mm256_and_si256(bytes[h], low));
        store(out + 32, _mm256_and_si256(_mm256_srli_epi16(bytes[h], 2), low));
        out += panel_bytes(quads);
        store(out, _mm256_and_si256(_mm256_srli_epi16(bytes[h], 4), low));
        store(out + 32, _mm256_and_si256(_mm256_srli_epi16(bytes[h], 6), low));
      }
    }
  }
}

inline __m256i four_activations(const int8_t* q) {
  int32_t four;
  memcpy(&four, q, sizeof four);
  return _mm256_set1_epi32(four);
}

// Kernel::multiply<Rows> adds the products of Rows rows and one panel to 16 sums of each row.
template <typename Kernel>
void gemm(const TernaryTile& tile, int32_t* sums) {
  unpack(tile);
  const int64_t quads = tile.weights.channels / 4;
  const int64_t panels = tile.bytes / kBlockBytes * 8;
  for (int64_t first = 0; first < tile.rows; first += kGemmRowsAtOnce) {
    const int64_t end = first + kGemmRowsAtOnce < tile.rows ? first + kGemmRowsAtOnce : tile.rows;
    for (int64_t panel = 0; panel < panels; ++panel) {
      if (first == 0) prefetch_next_tile(tile, panel, panels);
      const uint8_t* codes = tile.workspace + panel * panel_bytes(quads);
      int64_t row = first;
      while (row < end) {
        const int8_t* q = tile.q + row * tile.q_stride;
        int32_t* out = sums + row * kGemmSumsStride + panel * 2 * kVectorSums;
        const int64_t left = end - row;
        if (left == 6 || left > 8) {
          Kernel::template multiply<6>(codes, quads, q, tile.q_stride, out);
          row += 6;
        } else if (left >= 4) {
          Kernel::template multiply<4>(codes, quads, q, tile.q_stride, out);
          row += 4;
        } else if (left >= 2) {
          Kernel::template multiply<2>(codes, quads, q, tile.q_stride, out);
          row += 2;
        } else {
          Kernel::template multiply<1>(codes, quads, q, tile.q_stride, out);
          row += 1;
        }
      }
    }
  }
}

// The 128 outputs of one block, in natural order.
inline void finish_block(const int32_t* const* parts, int64_t part_count, int64_t begin, __m256i offset, __m256 factor,
                         float* y) {
  for (int h = 0; h < 4; ++h) {
    __m256 plane[4];
    for (int p = 0; p < 4; ++p) {
      __m256i sum = _mm256_sub_epi32(_mm256_setzero_si256(), offset);
      for (int64_t part = 0; part < part_count; ++part) {
        sum = _mm256_add_epi32(sum, load(parts[part] + begin + (4 * h + p) * kVectorSums));
      }
      plane[p] = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), factor);
    }
    // Transposes 4 planes x 4 bytes within each half: out[i] has the four outputs of byte i of either half.
    const __m256 ab0 = _mm256_unpacklo_ps(plane[0], plane[1]), ab1 = _mm256_unpackhi_ps(plane[0], plane[1]);
    const __m256 cd0 = _mm256_unpacklo_ps(plane[2], plane[3]), cd1 = _mm256_unpackhi_ps(plane[2], plane[3]);
    const __m256 out0 = _mm256_shuffle_ps(ab0, cd0, 0x44), out1 = _mm256_shuffle_ps(ab0, cd0, 0xee);
    const __m256 out2 = _mm256_shuffle_ps(ab1, cd1, 0x44), out3 = _mm256_shuffle_ps(ab1, cd1, 0xee);
    _mm256_storeu_ps(y + 16 * h, _mm256_permute2f128_ps(out0, out1, 0x20));
    _mm256_storeu_ps(y + 16 * h + 8, _mm256_permute2f128_ps(out2, out3, 0x20));
    _mm256_storeu_ps(y + 64 + 16 * h, _mm256_permute2f128_ps(out0, out1, 0x31));
    _mm256_storeu_ps(y + 64 + 16 * h + 8, _mm256_permute2f128_ps(out2, out3, 0x31));
  }
}

inline void finish(const int32_t* const* parts, int64_t part_count, int64_t begin, int64_t n, int32_t offset,
                   float factor, float* y) {
  const __m256i offsets = _mm256_set1_epi32(offset);
  const __m256 factors = _mm256_set1_ps(factor);
  int64_t i = 0;
  for (; i + kBlockSums <= n; i += kBlockSums) finish_block(parts, part_count, begin + i, offsets, factors, y + i);
  if (i < n) {
    float last[kBlockSums];
    finish_block(parts, part_count, begin + i, offsets, factors, last);
    memcpy(y + i, last, (n - i) * sizeof *y);
  }
}

}  // namespace
}  // namespace qsk

#endif  // QSK_SRC_TERNARY_AVX2_LAYOUT_H_
