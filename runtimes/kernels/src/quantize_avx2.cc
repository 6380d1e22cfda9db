// Absmax int8 quantisation, AVX2.
#include <immintrin.h>
#include <string.h>

#include "bit_positions.h"
#include "kernels.h"

namespace qsk {
namespace {

__m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
void store(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

int32_t sum_of(__m256i v) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
  return _mm_cvtsi128_si32(s);
}

uint32_t largest_magnitude(const float* x, int64_t n) {
  const __m256i mask = _mm256_set1_epi32(static_cast<int32_t>(kMagnitudeBits));
  __m256i largest4[4] = {};
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    QSK_UNROLL
    for (int v = 0; v < 4; ++v)
      largest4[v] = _mm256_max_epi32(largest4[v], _mm256_and_si256(load(x + i + 8 * v), mask));
  }
  const __m256i a =
      _mm256_max_epi32(_mm256_max_epi32(largest4[0], largest4[1]), _mm256_max_epi32(largest4[2], largest4[3]));
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

void quantize(const float* x, int64_t n, float inverse, int8_t* q) {
  const __m256 scale = _mm256_set1_ps(inverse);
  // The two packs leave the four-byte groups of the eight lanes as 0 4 1 5 2 6 3 7 reads them.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    // cvtps rounds half to even; the packs saturate to -128..127
    const __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(scale, _mm256_loadu_ps(x + i)));
    const __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(scale, _mm256_loadu_ps(x + i + 8)));
    const __m256i c = _mm256_cvtps_epi32(_mm256_mul_ps(scale, _mm256_loadu_ps(x + i + 16)));
    const __m256i d = _mm256_cvtps_epi32(_mm256_mul_ps(scale, _mm256_loadu_ps(x + i + 24)));
    const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
    store(q + i, _mm256_permutevar8x32_epi32(packed, order));
  }
  for (; i < n; ++i) {
    const int32_t value = _mm_cvtss_si32(_mm_set_ss(inverse * x[i]));
    q[i] = static_cast<int8_t>(value < -128 ? -128 : value > 127 ? 127 : value);
  }
}

// The first n of 32 bytes, for 0 <= n <= 32.
__m256i first_bytes(int64_t n) {
  alignas(32) static constexpr struct {
    int8_t ones[32] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,
                       -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
    int8_t zeros[32] = {};
  } kBytes;
  return load(kBytes.ones + 32 - n);
}

__m256i magnitudes(const int8_t* q) { return _mm256_abs_epi8(load(q)); }
__m256i last_magnitudes(const int8_t* q, int64_t n) {
  return _mm256_and_si256(magnitudes(q), first_bytes(n < 32 ? n : 32));
}
uint32_t bits_of(__m256i bytes) { return static_cast<uint32_t>(_mm256_movemask_epi8(bytes)); }

// How many of n magnitudes are above `bound`, which is at least 0.
int64_t count_above(const int8_t* q, int64_t n, int32_t bound) {
  const __m256i limit = _mm256_set1_epi8(static_cast<char>(bound)), zero = _mm256_setzero_si256();
  __m256i total = zero;
  int64_t i = 0;
  while (i + 128 <= n) {
    constexpr int64_t kMost = 128 * 255;  // what bytes can count
    const int64_t end = n - i > kMost ? i + kMost : n - 127;
    __m256i counts[4] = {zero, zero, zero, zero};
    for (; i < end; i += 128) {
      QSK_UNROLL
      for (int v = 0; v < 4; ++v) {
        counts[v] = _mm256_sub_epi8(counts[v], _mm256_cmpgt_epi8(magnitudes(q + i + 32 * v), limit));
      }
    }
    for (const __m256i& count : counts) total = _mm256_add_epi64(total, _mm256_sad_epu8(count, zero));
  }
  const __m128i halves = _mm_add_epi64(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
  int64_t count = _mm_cvtsi128_si64(halves) + _mm_extract_epi64(halves, 1);
  for (; i < n; i += 32) {
    count += _mm_popcnt_u32(bits_of(_mm256_cmpgt_epi8(last_magnitudes(q + i, n - i), limit)));
  }
  return count;
}

QuantizedCut cut(const int8_t* q, int64_t n, int64_t k) {
  int32_t least = 0;
  int64_t reached = n;
  for (int32_t bit = 64; bit != 0 && reached != k; bit >>= 1) {
    const int64_t above = count_above(q, n, (least | bit) - 1);
    if (above < k) continue;
    least |= bit;
    reached = above;
  }
  return {least, reached - k};
}

int64_t find(const int8_t* q, int64_t n, int32_t magnitude, int32_t* position) {
  const __m256i wanted = _mm256_set1_epi8(static_cast<char>(magnitude));
  int64_t count = 0;
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    uint64_t mask = bits_of(_mm256_cmpeq_epi8(magnitudes(q + i), wanted)) |
                    static_cast<uint64_t>(bits_of(_mm256_cmpeq_epi8(magnitudes(q + i + 32), wanted))) << 32;
    for (; mask != 0; mask &= mask - 1) position[count++] = static_cast<int32_t>(i) + __builtin_ctzll(mask);
  }
  for (; i < n; i += 32) {
    uint32_t mask = bits_of(_mm256_cmpeq_epi8(last_magnitudes(q + i, n - i), wanted));
    for (; mask != 0; mask &= mask - 1) position[count++] = static_cast<int32_t>(i) + __builtin_ctz(mask);
  }
  return count;
}

Tally drop_below(int8_t* q, int64_t n, int32_t least) {
  const __m256i below = _mm256_set1_epi8(static_cast<char>(least - 1)), ones = _mm256_set1_epi8(1);
  __m256i sums = _mm256_setzero_si256();
  int64_t active = 0;
  for (int64_t i = 0; i < n; i += 32) {
    const __m256i v = load(q + i), within = first_bytes(n - i < 32 ? n - i : 32);
    const __m256i kept = _mm256_and_si256(_mm256_cmpgt_epi8(_mm256_abs_epi8(v), below), within);
    const __m256i left = _mm256_and_si256(v, kept);
    store(q + i, _mm256_or_si256(left, _mm256_andnot_si256(within, v)));
    sums = _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(ones, left), _mm256_set1_epi16(1)));
    active += _mm_popcnt_u32(bits_of(kept));
  }
  return {sum_of(sums), static_cast<int32_t>(active)};
}

__m128i positions_in(uint32_t mask, int group) {
  return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kBitPositions.of[mask >> 8 * group & 0xff]));
}

int64_t count_in(uint32_t mask, int group) { return _mm_popcnt_u32(mask >> 8 * group & 0xff); }

// In slices, each twice over, as stores that alternate between the two lists take a third longer on Zen 3.
Tally compact(const int8_t* q, int64_t n, int32_t least, int32_t* index, int8_t* value) {
  constexpr int64_t kSlice = 1024;
  uint32_t masks[kSlice / 32];
  const __m256i below = _mm256_set1_epi8(static_cast<char>(least - 1)), ones = _mm256_set1_epi8(1);
  __m256i sums = _mm256_setzero_si256();
  __m256i first = sums;  // position of the group of eight, in all lanes
  const int32_t* const begin = index;
  for (int64_t slice = 0; slice < n; slice += kSlice) {
    const int64_t end = n - slice < kSlice ? n : slice + kSlice;
    for (int64_t i = slice; i < end; i += 32) {
      const __m256i v = load(q + i);
      const __m256i kept = _mm256_cmpgt_epi8(_mm256_abs_epi8(v), below);
      const __m256i pairs = _mm256_maddubs_epi16(ones, _mm256_and_si256(v, kept));
      sums = _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
      const uint32_t mask = masks[(i - slice) / 32] = bits_of(kept);
      QSK_UNROLL
      for (int group = 0; group < 4; ++group) {
        store(index, _mm256_add_epi32(_mm256_cvtepu8_epi32(positions_in(mask, group)), first));
        index += count_in(mask, group);
        first = _mm256_add_epi32(first, _mm256_set1_epi32(8));
      }
    }
    for (int64_t i = slice; i < end; i += 32) {
      const uint32_t mask = masks[(i - slice) / 32];
      QSK_UNROLL
      for (int group = 0; group < 4; ++group) {
        const __m128i values = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(q + i + 8 * group));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(value), _mm_shuffle_epi8(values, positions_in(mask, group)));
        value += count_in(mask, group);
      }
    }
  }
  return {sum_of(sums), static_cast<int32_t>(index - begin)};
}

}  // namespace

const QuantizeKernels quantize_avx2 = {largest_magnitude, quantize, cut, find, drop_below, compact};

}  // namespace qsk
