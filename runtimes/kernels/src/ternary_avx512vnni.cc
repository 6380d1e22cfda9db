// Ternary matmul, AVX-512 with VNNI.
//
// dpbusd adds the four products of unsigned codes and signed activations of four channels to an int32 lane. In one row
// the four outputs of a byte are four planes, masked without a shift, which multiplies the codes of plane p by 4^p (at
// most 2 * 64 = 128, still an unsigned byte) and is divided exactly when a group of channels is done.
//
// Order of sums: [block of 64 row bytes][h 0..3][plane p 0..3][16], where lane 4 l + i of a vector belongs to the row
// byte j = 16 l + 4 h + i of the block, and so to the output 4 j + p: the order in which unpacklo/unpackhi leave them.
#include <string.h>

#include "avx512.h"
#include "kernels.h"
#include "ternary_quads.h"

namespace qsk {
namespace {

constexpr int64_t kBlockBytes = 64;
constexpr int64_t kBlockSums = 4 * kBlockBytes;
constexpr int64_t kVectorSums = 16;

__m512i load(const void* p) { return _mm512_loadu_si512(p); }
void store(void* p, __m512i v) { _mm512_storeu_si512(p, v); }
void add_to(int32_t* sums, __m512i v) { store(sums, _mm512_add_epi32(load(sums), v)); }

// 64 bytes, or the 32 that a row ends with.
__m512i load_bytes(const uint8_t* p, bool is_half) {
  if (!is_half) return load(p);
  return _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), 0);
}

// bytes[h]: each 32-bit lane holds one row byte of four channels.
void interleave(__m512i a, __m512i b, __m512i c, __m512i d, __m512i bytes[4]) {
  const __m512i ab0 = _mm512_unpacklo_epi8(a, b), ab1 = _mm512_unpackhi_epi8(a, b);
  const __m512i cd0 = _mm512_unpacklo_epi8(c, d), cd1 = _mm512_unpackhi_epi8(c, d);
  bytes[0] = _mm512_unpacklo_epi16(ab0, cd0);
  bytes[1] = _mm512_unpackhi_epi16(ab0, cd0);
  bytes[2] = _mm512_unpacklo_epi16(ab1, cd1);
  bytes[3] = _mm512_unpackhi_epi16(ab1, cd1);
}

// sum += products of four channels. GCC 12 moves most sums to another register and back: an empty statement that claims
// to change one keeps it where it is.
void add_dot(__m512i codes, __m512i q, __m512i& sum) {
  sum = _mm512_dpbusd_epi32(sum, codes, q);
#if defined(__GNUC__) && !defined(QSK_EMULATE_VNNI)
  __asm__("" : "+v"(sum));
#endif
}

template <_mm_hint kHint>
void prefetch(const uint8_t* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p), kHint);
}

// Adds the products of the line at `column` of all rows of the group. Meanwhile prefetches the group's own next line
// into the first-level cache, where 32 rows would not fit, and that of the next group from memory.
template <bool kIsHalf>
void add_block(const QuadGroup& group, int64_t column, int64_t near, int32_t* block) {
  const __m512i mask0 = _mm512_set1_epi8(0x03), mask1 = _mm512_set1_epi8(0x0c), mask2 = _mm512_set1_epi8(0x30);
  const __m512i mask3 = _mm512_set1_epi8(static_cast<char>(0xc0));
  __m512i products[4][4];  // [h][plane]
  for (auto& planes : products) {
    for (auto& plane : planes) plane = _mm512_setzero_si512();
  }
  for (int64_t i = 0; i < group.quad_count; ++i) {
    const uint8_t* const* const rows = group.rows + 4 * i;
    const uint8_t* const* const next = group.next + 4 * i;
    for (int r = 0; r < 4; ++r) {
      prefetch<_MM_HINT_T0>(rows[r] + near);
      prefetch<_MM_HINT_T1>(next[r] + column);
    }
    int32_t four;
    memcpy(&four, group.activations + 4 * i, sizeof four);
    const __m512i q = _mm512_set1_epi32(four);
    __m512i bytes[4];
    interleave(load_bytes(rows[0] + column, kIsHalf), load_bytes(rows[1] + column, kIsHalf),
               load_bytes(rows[2] + column, kIsHalf), load_bytes(rows[3] + column, kIsHalf), bytes);
    for (int h = 0; h < 4; ++h) {
      add_dot(_mm512_and_si512(bytes[h], mask0), q, products[h][0]);
      add_dot(_mm512_and_si512(bytes[h], mask1), q, products[h][1]);
      add_dot(_mm512_and_si512(bytes[h], mask2), q, products[h][2]);
      add_dot(_mm512_and_si512(bytes[h], mask3), q, products[h][3]);
    }
  }
  for (int h = 0; h < 4; ++h) {
    add_to(block + (4 * h + 0) * kVectorSums, products[h][0]);
    add_to(block + (4 * h + 1) * kVectorSums, _mm512_srai_epi32(products[h][1], 2));
    add_to(block + (4 * h + 2) * kVectorSums, _mm512_srai_epi32(products[h][2], 4));
    add_to(block + (4 * h + 3) * kVectorSums, _mm512_srai_epi32(products[h][3], 6));
  }
}

void gemv(const TernaryRows& rows, int32_t* sums) {
  if (rows.count <= 0) return;
  const int64_t row_bytes = rows.row_bytes;
  QuadGroup group;
  set_up(group, rows);
  int64_t column = 0;
  for (; column + kBlockBytes <= row_bytes; column += kBlockBytes, sums += kBlockSums) {
    const int64_t near = column + kBlockBytes < row_bytes ? column + kBlockBytes : column;
    add_block<false>(group, column, near, sums);
  }
  if (column < row_bytes) add_block<true>(group, column, column, sums);
}

// Panels start a line further than their contents need: 8192 bytes apart, all of them would share one set of the cache.
int64_t panel_bytes(int64_t quads) { return quads * 128 + kGemmPanelGap; }

// Four channels' bytes as [panel of two vectors][quad of channels][two vectors]: each 32-bit lane holds the four codes
// of one output, in the order of the sums.
void unpack(const TernaryTile& tile) {
  const int64_t quads = tile.weights.channels / 4;
  const __m512i low = _mm512_set1_epi8(0x03);
  const bool is_half = tile.bytes < kBlockBytes;
  for (int64_t t = 0; t < quads; ++t) {
    const uint8_t* rows[4];
    for (int i = 0; i < 4; ++i) rows[i] = tile.weights.w + tile.weights.index[4 * t + i] * tile.row_bytes;
    __m512i bytes[4];
    interleave(load_bytes(rows[0], is_half), load_bytes(rows[1], is_half), load_bytes(rows[2], is_half),
               load_bytes(rows[3], is_half), bytes);
    for (int h = 0; h < 4; ++h) {
      uint8_t* out = tile.workspace + 2 * h * panel_bytes(quads) + t * 128;
      store(out, _mm512_and_si512(bytes[h], low));
      store(out + 64, _mm512_and_si512(_mm512_srli_epi16(bytes[h], 2), low));
      out += panel_bytes(quads);
      store(out, _mm512_and_si512(_mm512_srli_epi16(bytes[h], 4), low));
      store(out + 64, _mm512_and_si512(_mm512_srli_epi16(bytes[h], 6), low));
    }
  }
}

// Rows x 32 outputs.
template <int Rows>
void multiply(const uint8_t* panel, int64_t quads, const int8_t* q, int64_t q_stride, int32_t* sums) {
  __m512i a[Rows], b[Rows];
  QSK_UNROLL
  for (int r = 0; r < Rows; ++r) {
    a[r] = load(sums + r * kGemmSumsStride);
    b[r] = load(sums + r * kGemmSumsStride + kVectorSums);
  }
  for (int64_t t = 0; t < quads; ++t) {
    const __m512i codes0 = load(panel + 128 * t), codes1 = load(panel + 128 * t + 64);
    QSK_UNROLL
    for (int r = 0; r < Rows; ++r) {
      int32_t four;
      memcpy(&four, q + r * q_stride + 4 * t, sizeof four);
      const __m512i activations = _mm512_set1_epi32(four);
      a[r] = _mm512_dpbusd_epi32(a[r], codes0, activations);
      b[r] = _mm512_dpbusd_epi32(b[r], codes1, activations);
    }
  }
  QSK_UNROLL
  for (int r = 0; r < Rows; ++r) {
    store(sums + r * kGemmSumsStride, a[r]);
    store(sums + r * kGemmSumsStride + kVectorSums, b[r]);
  }
}

void gemm(const TernaryTile& tile, int32_t* sums) {
  unpack(tile);
  const int64_t quads = tile.weights.channels / 4;
  for (int64_t first = 0; first < tile.rows; first += kGemmRowsAtOnce) {
    const int64_t end = first + kGemmRowsAtOnce < tile.rows ? first + kGemmRowsAtOnce : tile.rows;
    for (int64_t panel = 0; panel < 8; ++panel) {
      if (first == 0) prefetch_next_tile(tile, panel, 8);
      const uint8_t* codes = tile.workspace + panel * panel_bytes(quads);
      int64_t row = first;
      while (row < end) {
        const int8_t* q = tile.q + row * tile.q_stride;
        int32_t* out = sums + row * kGemmSumsStride + panel * 2 * kVectorSums;
        const int64_t left = end - row;
        if (left >= 12) {
          multiply<12>(codes, quads, q, tile.q_stride, out);
          row += 12;
        } else if (left >= 4) {
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

// The 256 outputs of one block, in natural order.
void finish_block(const int32_t* const* parts, int64_t part_count, int64_t begin, __m512i offset, __m512 factor,
                  float* y) {
  for (int h = 0; h < 4; ++h) {
    __m512 plane[4];
    for (int p = 0; p < 4; ++p) {
      __m512i sum = _mm512_sub_epi32(_mm512_setzero_si512(), offset);
      for (int64_t part = 0; part < part_count; ++part) {
        sum = _mm512_add_epi32(sum, load(parts[part] + begin + (4 * h + p) * kVectorSums));
      }
      plane[p] = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), factor);
    }
    // Transposes 4 planes x 4 bytes within each quarter: out[i] has the four outputs of byte i of every quarter.
    const __m512 ab0 = _mm512_unpacklo_ps(plane[0], plane[1]), ab1 = _mm512_unpackhi_ps(plane[0], plane[1]);
    const __m512 cd0 = _mm512_unpacklo_ps(plane[2], plane[3]), cd1 = _mm512_unpackhi_ps(plane[2], plane[3]);
    const __m512 out[4] = {_mm512_shuffle_ps(ab0, cd0, 0x44), _mm512_shuffle_ps(ab0, cd0, 0xee),
                           _mm512_shuffle_ps(ab1, cd1, 0x44), _mm512_shuffle_ps(ab1, cd1, 0xee)};
    for (int i = 0; i < 4; ++i) {
      float* at = y + 16 * h + 4 * i;
      _mm_storeu_ps(at, _mm512_castps512_ps128(out[i]));
      _mm_storeu_ps(at + 64, _mm512_extractf32x4_ps(out[i], 1));
      _mm_storeu_ps(at + 128, _mm512_extractf32x4_ps(out[i], 2));
      _mm_storeu_ps(at + 192, _mm512_extractf32x4_ps(out[i], 3));
    }
  }
}

void finish(const int32_t* const* parts, int64_t part_count, int64_t begin, int64_t n, int32_t offset, float factor,
            float* y) {
  const __m512i offsets = _mm512_set1_epi32(offset);
  const __m512 factors = _mm512_set1_ps(factor);
  int64_t i = 0;
  for (; i + kBlockSums <= n; i += kBlockSums) finish_block(parts, part_count, begin + i, offsets, factors, y + i);
  if (i < n) {
    float last[kBlockSums];
    finish_block(parts, part_count, begin + i, offsets, factors, last);
    memcpy(y + i, last, (n - i) * sizeof *y);
  }
}

}  // namespace

const TernaryKernels ternary_avx512vnni = {kBlockBytes, gemv, 1.0f, {{1.2f, 0.5f}, kGemmTile, gemm}, nullptr, finish};

}  // namespace qsk
