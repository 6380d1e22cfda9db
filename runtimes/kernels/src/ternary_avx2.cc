// Ternary matmul, AVX2 without VNNI.
//
// Codes 0..2 are the unsigned operand of maddubs, activations the signed one: the two products of a pair of channels
// add up in an int16 lane. In one row the four outputs of a byte are four planes; the planes 1 and 3 are masked without
// a shift, which multiplies their codes by 4, and divided exactly when a group of channels is done:
//   2 * 128 * (2 * 4) * 16 pairs = 32768, and the positive side is below it, so 32 channels just fit.
#include "ternary_avx2_layout.h"

namespace qsk {
namespace {

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

// Rows x 16 outputs over up to 64 quads: 64 pairs of products, at most 64 * 2 * 2 * 128 = 32768 below zero and less
// above, fit an int16 lane.
struct Maddubs {
  template <int Rows>
  static void multiply(const uint8_t* panel, int64_t quads, const int8_t* q, int64_t q_stride, int32_t* sums) {
    static_assert(kGemmTileChannels / 4 <= 64, "int16 sums");
    __m256i a[Rows], b[Rows];
    QSK_UNROLL
    for (int r = 0; r < Rows; ++r) a[r] = b[r] = _mm256_setzero_si256();
    for (int64_t t = 0; t < quads; ++t) {
      const __m256i codes0 = load(panel + 64 * t), codes1 = load(panel + 64 * t + 32);
      QSK_UNROLL
      for (int r = 0; r < Rows; ++r) {
        const __m256i activations = four_activations(q + r * q_stride + 4 * t);
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
};

}  // namespace

const TernaryKernels ternary_avx2 = {kBlockBytes,          gemv,  1.3f, {{1.6f, 0.55f}, kGemmTile, gemm<Maddubs>},
                                     &ternary_tables_avx2, finish};

}  // namespace qsk
