// Ternary matmul, AVX2 without VNNI.
//
// Codes 0..2 are the unsigned operand of maddubs, activations the signed one: the two products of a pair of channels
// add up in an int16 lane. In one row the four outputs of a byte are four planes; the planes 1 and 3 are masked without
// a shift, which multiplies their codes by 4, and divided exactly when a group of channels is done:
//   2 * 128 * (2 * 4) * 16 pairs = 32768, and the positive side is below it, so 32 channels just fit.
//
// Order of sums: [block of 32 row bytes][h 0..3][plane p 0..3][8], where lane 4 l + i of a vector belongs to the row
// byte j = 16 l + 4 h + i of the block, and so to the output 4 j + p: the order in which unpacklo/unpackhi leave them.
#include <immintrin.h>
#include <string.h>

#include "kernels.h"

namespace qsk {
namespace {

constexpr int64_t kBlockBytes = 32;
constexpr int64_t kLineBytes = 64;  // of the cache
constexpr int64_t kBlockSums = 4 * kBlockBytes;
constexpr int64_t kVectorSums = 8;

__m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
void store(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

void add_to(int32_t* sums, __m256i v) { store(sums, _mm256_add_epi32(load(sums), v)); }

// Widens 16 int16 sums: the lower four of each half to sums[0..8), the upper four to the vector of the next h.
void widen_add(int32_t* sums, __m256i v) {
  const __m256i sign = _mm256_srai_epi16(v, 15);
  add_to(sums, _mm256_unpacklo_epi16(v, sign));
  add_to(sums + 4 * kVectorSums, _mm256_unpackhi_epi16(v, sign));
}

// sum += products of pairs of channels. GCC 12 schedules sums and the products that go into them so that sums spill or
// move between registers, a third more instructions: an addition that it cannot take apart keeps each in its register.
void add_product(__m256i codes, __m256i q, __m256i& sum) {
  const __m256i products = _mm256_maddubs_epi16(codes, q);
#if defined(__GNUC__)
  __asm__("vpaddw %1, %0, %0" : "+x"(sum) : "x"(products));
#else
  sum = _mm256_add_epi16(sum, products);
#endif
}

// sums += products of two interleaved channels' bytes: the planes 0..3, of which 1 and 3 are times 4.
void add_planes(__m256i bytes, __m256i q, __m256i sums[4]) {
  const __m256i low = _mm256_set1_epi8(0x03), high = _mm256_set1_epi8(0x0c);
  const __m256i upper = _mm256_srli_epi16(bytes, 4);
  add_product(_mm256_and_si256(bytes, low), q, sums[0]);
  add_product(_mm256_and_si256(bytes, high), q, sums[1]);
  add_product(_mm256_and_si256(upper, low), q, sums[2]);
  add_product(_mm256_and_si256(upper, high), q, sums[3]);
}

// One group of channels: the rows that are read now, and those of the next group.
struct Group {
  const uint8_t* rows[kGemvRows];
  const uint8_t* next[kGemvRows];
  int32_t pairs[kGemvRows / 2];  // two activations, twice
  int64_t pair_count;
};

void set_up(Group& group, const uint8_t* w, int64_t row_bytes, const int32_t* index, const int8_t* value, int64_t count,
            const int32_t* next, int64_t next_count) {
  for (int64_t i = 0; i < count; ++i) group.rows[i] = w + index[i] * row_bytes;
  if (count % 2 != 0) group.rows[count] = w + index[count - 1] * row_bytes;  // with an activation of 0
  group.pair_count = (count + 1) / 2;
  for (int64_t i = 0; i < group.pair_count; ++i) {
    const uint32_t first = static_cast<uint8_t>(value[2 * i]);
    const uint32_t second = 2 * i + 1 < count ? static_cast<uint8_t>(value[2 * i + 1]) : 0;
    group.pairs[i] = static_cast<int32_t>((first | second << 8) * 0x10001u);
  }
  for (int64_t i = 0; i < kGemvRows; ++i) {  // without a next group, what is in the cache already
    group.next[i] = i < next_count ? w + next[i] * row_bytes : group.rows[0];
  }
}

template <_mm_hint kHint>
void prefetch(const uint8_t* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p), kHint);
}

// Adds the products of 32 bytes of all rows of the group to 128 sums. Meanwhile every step prefetches two lines: the
// group's own next one into the first-level cache, where 32 rows would not fit, and one of the next group from memory.
// kOdd: which half of a line; the rows share the prefetching among the two halves.
template <int kOdd, bool kLastLine>
inline __attribute__((always_inline)) void add_block(const Group& group, int64_t column, int32_t* block) {
  __m256i lower[4], upper[4];  // of the bytes 0..7 and 8..15 of each half
  for (int p = 0; p < 4; ++p) lower[p] = upper[p] = _mm256_setzero_si256();
  for (int64_t i = 0; i < group.pair_count; ++i) {
    const uint8_t* const rows[2] = {group.rows[2 * i] + column, group.rows[2 * i + 1] + column};
    const uint8_t* const next = group.next[2 * i + kOdd];
    prefetch<_MM_HINT_T0>(kLastLine ? next : rows[kOdd] + kLineBytes);
    prefetch<_MM_HINT_T1>(next + column);
    const __m256i a = load(rows[0]), b = load(rows[1]);
    const __m256i q = _mm256_set1_epi32(group.pairs[i]);
    add_planes(_mm256_unpacklo_epi8(a, b), q, lower);
    add_planes(_mm256_unpackhi_epi8(a, b), q, upper);
  }
  for (int p = 0; p < 4; ++p) {
    const bool times4 = p % 2 != 0;
    widen_add(block + p * kVectorSums, times4 ? _mm256_srai_epi16(lower[p], 2) : lower[p]);
    widen_add(block + (8 + p) * kVectorSums, times4 ? _mm256_srai_epi16(upper[p], 2) : upper[p]);
  }
}

void gemv(const uint8_t* w, int64_t row_bytes, const int32_t* index, const int8_t* value, int64_t count,
          const int32_t* next, int64_t next_count, int32_t* sums) {
  if (count <= 0) return;
  Group group;
  set_up(group, w, row_bytes, index, value, count, next, next_count);
  int64_t column = 0;
  for (; column + kLineBytes < row_bytes; column += kLineBytes, sums += 2 * kBlockSums) {
    add_block<0, false>(group, column, sums);
    add_block<1, false>(group, column + kBlockBytes, sums + kBlockSums);
  }
  add_block<0, true>(group, column, sums);
  if (column + kBlockBytes < row_bytes) add_block<1, true>(group, column + kBlockBytes, sums + kBlockSums);
}

// Panels start a line further than their contents need: 4096 bytes apart, all of them would share one set of the cache.
int64_t panel_bytes(int64_t quads) { return quads * 64 + kGemmPanelGap; }

// Four channels' bytes as [panel of two vectors][quad of channels][two vectors]: each 32-bit lane holds the four codes
// of one output, in the order of the sums.
void unpack(const TernaryTile& tile) {
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
        uint8_t* out = tile.codes + panel * panel_bytes(quads) + t * 64;
        store(out, _mm256_and_si256(bytes[h], low));
        store(out + 32, _mm256_and_si256(_mm256_srli_epi16(bytes[h], 2), low));
        out += panel_bytes(quads);
        store(out, _mm256_and_si256(_mm256_srli_epi16(bytes[h], 4), low));
        store(out + 32, _mm256_and_si256(_mm256_srli_epi16(bytes[h], 6), low));
      }
    }
  }
}

// Rows x 16 outputs over up to 64 quads: 64 pairs of products, at most 64 * 2 * 2 * 128 = 32768 below zero and less
// above, fit an int16 lane.
template <int Rows>
void multiply(const uint8_t* panel, int64_t quads, const int8_t* q, int64_t q_stride, int32_t* sums) {
  __m256i a[Rows], b[Rows];
  QSK_UNROLL
  for (int r = 0; r < Rows; ++r) a[r] = b[r] = _mm256_setzero_si256();
  for (int64_t t = 0; t < quads; ++t) {
    const __m256i codes0 = load(panel + 64 * t), codes1 = load(panel + 64 * t + 32);
    QSK_UNROLL
    for (int r = 0; r < Rows; ++r) {
      int32_t four;
      memcpy(&four, q + r * q_stride + 4 * t, sizeof four);
      const __m256i activations = _mm256_set1_epi32(four);
      add_product(codes0, activations, a[r]);
      add_product(codes1, activations, b[r]);
    }
  }
  const __m256i ones = _mm256_set1_epi16(1);
  QSK_UNROLL
  for (int r = 0; r < Rows; ++r) {
    add_to(sums + r * kGemmSumsStride, _mm256_madd_epi16(a[r], ones));
    add_to(sums + r * kGemmSumsStride + kVectorSums, _mm256_madd_epi16(b[r], ones));
  }
}

// Rows that pass all panels together: their activations take a tenth of the first-level cache, and few pages. A
// multiple of 6.
constexpr int64_t kRowsAtOnce = 12;

void gemm(const TernaryTile& tile, int32_t* sums) {
  static_assert(kGemmTileChannels / 4 <= 64, "int16 sums");
  unpack(tile);
  const int64_t quads = tile.weights.channels / 4;
  const int64_t panels = tile.bytes / kBlockBytes * 8;
  for (int64_t first = 0; first < tile.rows; first += kRowsAtOnce) {
    const int64_t end = first + kRowsAtOnce < tile.rows ? first + kRowsAtOnce : tile.rows;
    for (int64_t panel = 0; panel < panels; ++panel) {
      if (first == 0) prefetch_next_tile(tile, panel, panels);
      const uint8_t* codes = tile.codes + panel * panel_bytes(quads);
      int64_t row = first;
      while (row < end) {
        const int8_t* q = tile.q + row * tile.q_stride;
        int32_t* out = sums + row * kGemmSumsStride + panel * 2 * kVectorSums;
        const int64_t left = end - row;
        if (left == 6 || left > 8) {
          multiply<6>(codes, quads, q, tile.q_stride, out);
          row += 6;
        } else if (left >= 4) {
          multiply<4>(codes, quads, q, tile.q_stride, out);
          row += 4;
        } else if (left >= 2) {
          multiply<2>(codes, quads, q, tile.q_stride, out);
          row += 2;
        } else {
          multiply<1>(codes, quads, q, tile.q_stride, out);
          row += 1;
        }
      }
    }
  }
}

// The 128 outputs of one block, in natural order.
void finish_block(const int32_t* const* parts, int64_t part_count, int64_t begin, __m256i offset, __m256 factor,
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

void finish(const int32_t* const* parts, int64_t part_count, int64_t begin, int64_t n, int32_t offset, float factor,
            float* y) {
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

const TernaryKernels ternary_avx2 = {kBlockBytes, {1.6f, 0.55f}, gemv, gemm, finish};

}  // namespace qsk
