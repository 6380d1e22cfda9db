// Ternary matmul, AVX2 without VNNI.
//
// Codes 0..2 are the unsigned operand of maddubs, activations the signed one: the two products of a pair of channels
// add up in an int16 lane. In one row the four outputs of a byte are four planes; the planes 1 and 3 are masked without
// a shift, which multiplies their codes by 4, and divided exactly when a group of channels is done:
//   2 * 128 * (2 * 4) * 16 pairs = 32768, and the positive side is below it, so 32 channels just fit; and more of them
// whose activations are small (kMostMagnitude).
#include "ternary_avx2_layout.h"

namespace qsk {
namespace {

constexpr int64_t kPartialSums = 16;  // int16 sums in a vector

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

// Rows that a pass reads together. Hardware prefetchers follow few streams, and keep up where other processors use the
// memory too, when prefetch instructions alone do not; a row of a few lines is over before they have begun.
constexpr int64_t kMostPassRows = kGemvRows;  // from the cache
constexpr int64_t kShortPassRows = 16;
constexpr int64_t kLongPassRows = 8;
constexpr int64_t kLongRowBytes = 2048;

int64_t pass_rows_of(const TernaryRows& rows) {
  if (rows.is_cached) return kMostPassRows;
  return rows.row_bytes < kLongRowBytes ? kShortPassRows : kLongPassRows;
}

struct Pass {
  const uint8_t* rows[kMostPassRows];
  const uint8_t* next[kMostPassRows];  // of the pass that comes after this one
  int32_t pairs[kMostPassRows / 2];    // two activations, twice
  int64_t pair_count;
};

// The rows begin..end-1 of `given`.
void set_up(Pass& pass, const TernaryRows& given, int64_t begin, int64_t end) {
  const int64_t count = end - begin, left = given.count - end;
  for (int64_t i = 0; i < count; ++i) pass.rows[i] = given.w + given.index[begin + i] * given.row_bytes;
  if (count % 2 != 0) pass.rows[count] = given.w + given.index[end - 1] * given.row_bytes;  // with an activation of 0
  pass.pair_count = (count + 1) / 2;
  for (int64_t i = 0; i < pass.pair_count; ++i) {
    const int8_t* const values = given.value + begin + 2 * i;
    const uint32_t first = static_cast<uint8_t>(values[0]);
    const uint32_t second = 2 * i + 1 < count ? static_cast<uint8_t>(values[1]) : 0;
    pass.pairs[i] = static_cast<int32_t>((first | second << 8) * 0x10001u);
  }
  const int32_t* const next = left > 0 ? given.index + end : given.next;
  const int64_t next_count = left > 0 ? left : given.next_count;
  const int64_t known = next_count < 2 * pass.pair_count ? next_count : 2 * pass.pair_count;
  for (int64_t i = 0; i < known; ++i) pass.next[i] = given.w + next[i] * given.row_bytes;
  for (int64_t i = known; i < 2 * pass.pair_count; ++i) pass.next[i] = pass.rows[0];  // which is in the cache
}

// Where the sums of passes begin and end: they stay int16 in between.
enum class Begins { kNo, kYes };
enum class Ends { kNo, kYes };

// Adds the products of 32 bytes of all rows of the pass to 128 sums. Meanwhile every step prefetches two lines: the
// pass's own next one into the first-level cache, and one of the next pass from memory.
// kOdd: which half of a line; the rows share the prefetching among the two halves.
template <Begins kBegins, Ends kEnds, int kOdd, bool kLastLine>
inline __attribute__((always_inline)) void add_block(const Pass& pass, int64_t column, int16_t* partial,
                                                     int32_t* sums) {
  __m256i lower[4], upper[4];  // of the bytes 0..7 and 8..15 of each half
  for (int p = 0; p < 4; ++p) {
    lower[p] = kBegins == Begins::kYes ? _mm256_setzero_si256() : load(partial + p * kPartialSums);
    upper[p] = kBegins == Begins::kYes ? _mm256_setzero_si256() : load(partial + (4 + p) * kPartialSums);
  }
  for (int64_t i = 0; i < pass.pair_count; ++i) {
    const uint8_t* const rows[2] = {pass.rows[2 * i] + column, pass.rows[2 * i + 1] + column};
    const uint8_t* const next = pass.next[2 * i + kOdd];
    prefetch<_MM_HINT_T0>(kLastLine ? next : rows[kOdd] + kLineBytes);
    prefetch<_MM_HINT_T1>(next + column);
    const __m256i a = load(rows[0]), b = load(rows[1]);
    const __m256i q = _mm256_set1_epi32(pass.pairs[i]);
    add_planes(_mm256_unpacklo_epi8(a, b), q, lower);
    add_planes(_mm256_unpackhi_epi8(a, b), q, upper);
  }
  for (int p = 0; p < 4; ++p) {
    if (kEnds == Ends::kNo) {
      store(partial + p * kPartialSums, lower[p]);
      store(partial + (4 + p) * kPartialSums, upper[p]);
      continue;
    }
    const bool times4 = p % 2 != 0;
    widen_add(sums + p * kVectorSums, times4 ? _mm256_srai_epi16(lower[p], 2) : lower[p]);
    widen_add(sums + (8 + p) * kVectorSums, times4 ? _mm256_srai_epi16(upper[p], 2) : upper[p]);
  }
}

template <Begins kBegins, Ends kEnds>
void add_pass(const Pass& pass, int64_t row_bytes, int16_t* partial, int32_t* sums) {
  int64_t column = 0;
  for (; column + kLineBytes < row_bytes; column += kLineBytes) {
    add_block<kBegins, kEnds, 0, false>(pass, column, partial, sums);
    add_block<kBegins, kEnds, 1, false>(pass, column + kBlockBytes, partial + kBlockSums, sums + kBlockSums);
    partial += 2 * kBlockSums;
    sums += 2 * kBlockSums;
  }
  add_block<kBegins, kEnds, 0, true>(pass, column, partial, sums);
  if (column + kBlockBytes < row_bytes) {
    add_block<kBegins, kEnds, 1, true>(pass, column + kBlockBytes, partial + kBlockSums, sums + kBlockSums);
  }
}

void gemv(const TernaryRows& rows, int32_t* sums) {
  const int64_t pass_rows = pass_rows_of(rows);
  for (int64_t begin = 0; begin < rows.count; begin += pass_rows) {
    const int64_t end = begin + pass_rows < rows.count ? begin + pass_rows : rows.count;
    const bool begins = rows.begins && begin == 0, ends = rows.ends && end == rows.count;
    Pass pass;
    set_up(pass, rows, begin, end);
    if (begins && ends) {
      add_pass<Begins::kYes, Ends::kYes>(pass, rows.row_bytes, rows.partial, sums);
    } else if (begins) {
      add_pass<Begins::kYes, Ends::kNo>(pass, rows.row_bytes, rows.partial, sums);
    } else if (ends) {
      add_pass<Begins::kNo, Ends::kYes>(pass, rows.row_bytes, rows.partial, sums);
    } else {
      add_pass<Begins::kNo, Ends::kNo>(pass, rows.row_bytes, rows.partial, sums);
    }
  }
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
