// Absmax int8 quantisation, AVX2.
#include <immintrin.h>
#include <string.h>

#include "kernels.h"

namespace qsk {
namespace {

int32_t sum_of(__m256i v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
  return _mm_cvtsi128_si32(s);
}

uint32_t largest_magnitude(const float* x, int64_t n) {
  const __m256i mask = _mm256_set1_epi32(static_cast<int32_t>(kMagnitudeBits));
  __m256i a = _mm256_setzero_si256(), b = a;
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const auto* p = reinterpret_cast<const __m256i*>(x + i);
    a = _mm256_max_epi32(a, _mm256_and_si256(_mm256_loadu_si256(p), mask));
    b = _mm256_max_epi32(b, _mm256_and_si256(_mm256_loadu_si256(p + 1), mask));
  }
  a = _mm256_max_epi32(a, b);
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
  uint32_t largest = static_cast<uint32_t>(_mm_cvtsi128_si32(m));
  for (; i < n; ++i) {
    uint32_t bits;
    memcpy(&bits, x + i, sizeof bits);
    bits &= kMagnitudeBits;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

int32_t quantize(const float* x, int64_t n, float inverse, int8_t* q) {
  const __m256 scale = _mm256_set1_ps(inverse);
  // The two packs leave the four-byte groups of the eight lanes as 0 4 1 5 2 6 3 7 reads them.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  __m256i sums = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    // cvtps rounds half to even; the packs saturate to -128..127
    const __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(scale, _mm256_loadu_ps(x + i)));
    const __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(scale, _mm256_loadu_ps(x + i + 8)));
    const __m256i c = _mm256_cvtps_epi32(_mm256_mul_ps(scale, _mm256_loadu_ps(x + i + 16)));
    const __m256i d = _mm256_cvtps_epi32(_mm256_mul_ps(scale, _mm256_loadu_ps(x + i + 24)));
    const __m256i ab = _mm256_packs_epi32(a, b), cd = _mm256_packs_epi32(c, d);
    sums = _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_add_epi16(ab, cd), _mm256_set1_epi16(1)));
    const __m256i packed = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(ab, cd), order);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + i), packed);
  }
  int32_t sum = sum_of(sums);
  for (; i < n; ++i) {
    int32_t value = _mm_cvtss_si32(_mm_set_ss(inverse * x[i]));
    value = value < -128 ? -128 : value > 127 ? 127 : value;
    q[i] = static_cast<int8_t>(value);
    sum += value;
  }
  return sum;
}

// For every mask of eight bits the positions of its ones, lowest first.
struct Positions {
  uint8_t of[256][8];
};

constexpr Positions make_positions() {
  Positions positions = {};
  for (int mask = 0; mask < 256; ++mask) {
    int count = 0;
    for (int bit = 0; bit < 8; ++bit) {
      if (mask >> bit & 1) positions.of[mask][count++] = static_cast<uint8_t>(bit);
    }
  }
  return positions;
}

alignas(64) constexpr Positions kPositions = make_positions();

int64_t compact(const int8_t* q, int64_t n, int32_t* index, int8_t* value) {
  int64_t count = 0;
  const __m256i zero = _mm256_setzero_si256();
  for (int64_t i = 0; i < n; i += 32) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + i));
    uint32_t active = ~static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(v, zero)));
    for (int64_t j = i; active != 0; j += 8, active >>= 8) {
      const uint32_t mask = active & 0xff;
      const __m128i positions = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kPositions.of[mask]));
      const __m128i values = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(q + j));
      const __m256i indices =
          _mm256_add_epi32(_mm256_cvtepu8_epi32(positions), _mm256_set1_epi32(static_cast<int32_t>(j)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(index + count), indices);
      _mm_storel_epi64(reinterpret_cast<__m128i*>(value + count), _mm_shuffle_epi8(values, positions));
      count += _mm_popcnt_u32(mask);
    }
  }
  return count;
}

}  // namespace

const QuantizeKernels quantize_avx2 = {largest_magnitude, quantize, compact};

}  // namespace qsk
