// Selection of the k-th largest magnitude, AVX2: the upper 16 bits of it by bisection, counting all keys at each step,
// 16 at a time; then the lower 16 bits among the few keys that share the upper ones.
#include <immintrin.h>
#include <string.h>

#include "kernels.h"

namespace qsk {
namespace {

const __m256i* vectors(const void* p) { return static_cast<const __m256i*>(p); }

// Keys as int16, biased so that signed comparison orders them; padded to a multiple of 16 with the smallest.
constexpr int16_t kSmallest = INT16_MIN;

__m256i bits_at(const float* x) {
  return _mm256_and_si256(_mm256_loadu_si256(vectors(x)), _mm256_set1_epi32(static_cast<int32_t>(kMagnitudeBits)));
}

__m256i capped(__m256i bits) { return _mm256_min_epi32(bits, _mm256_set1_epi32(static_cast<int32_t>(kInfinityBits))); }

uint32_t key_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  bits &= kMagnitudeBits;
  return bits > kInfinityBits ? kInfinityBits : bits;
}

// How many of the first `vector_count` * 16 keys are above `bound`.
int64_t count_above(const int16_t* keys, int64_t vector_count, int16_t bound) {
  const __m256i limit = _mm256_set1_epi16(bound);
  const __m256i ones = _mm256_set1_epi16(1);
  int64_t total = 0;
  for (int64_t begin = 0; begin < vector_count;) {
    // int16 lanes count down from 0, by at most 2 * 16383 a slice
    const int64_t end = begin + 32766 < vector_count ? begin + 32766 : vector_count;
    __m256i a = _mm256_setzero_si256(), b = a;
    int64_t i = begin;
    for (; i + 2 <= end; i += 2) {
      a = _mm256_add_epi16(a, _mm256_cmpgt_epi16(_mm256_load_si256(vectors(keys) + i), limit));
      b = _mm256_add_epi16(b, _mm256_cmpgt_epi16(_mm256_load_si256(vectors(keys) + i + 1), limit));
    }
    if (i < end) a = _mm256_add_epi16(a, _mm256_cmpgt_epi16(_mm256_load_si256(vectors(keys) + i), limit));
    const __m256i sums = _mm256_add_epi32(_mm256_madd_epi16(a, ones), _mm256_madd_epi16(b, ones));
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1));
    total -= _mm_cvtsi128_si32(s);
    begin = end;
  }
  return total;
}

struct Found {
  int32_t key;    // unbiased, 0..65535
  int64_t above;  // keys above it
  int64_t equal;  // keys that equal it; when those at or above it are exactly the wanted, they all may count as equal
};

// The `wanted`-th largest of `count` keys whose unbiased values are below `end`, a power of two; 0 < wanted <= count.
Found bisect(const int16_t* keys, int64_t count, int64_t wanted, int32_t end) {
  const int64_t vector_count = (count + 15) / 16;
  int32_t key = 0;
  int64_t at_least = count;
  int64_t above = 0;
  for (int32_t bit = end >> 1; bit != 0; bit >>= 1) {
    const int32_t candidate = key | bit;
    const int64_t reached = count_above(keys, vector_count, static_cast<int16_t>(candidate - 1 + kSmallest));
    if (reached == wanted) return {candidate, 0, wanted};
    if (reached > wanted) {
      key = candidate;
      at_least = reached;
    } else {
      above = reached;  // the last refused candidate is key + 1 once all lower bits are decided
    }
  }
  return {key, above, at_least - above};
}

TopKCut select(const float* x, int64_t n, int64_t k, void* scratch) {
  const int64_t padded = (n + 15) / 16 * 16;
  int16_t* upper = static_cast<int16_t*>(scratch);
  int16_t* lower = upper + padded;
  const __m256i bias = _mm256_set1_epi16(kSmallest);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m256i a = _mm256_srli_epi32(capped(bits_at(x + i)), 16);
    const __m256i b = _mm256_srli_epi32(capped(bits_at(x + i + 8)), 16);
    // in whatever order: only counts matter
    _mm256_store_si256(reinterpret_cast<__m256i*>(upper + i), _mm256_add_epi16(_mm256_packus_epi32(a, b), bias));
  }
  for (; i < n; ++i) upper[i] = static_cast<int16_t>(static_cast<int32_t>(key_of(x[i]) >> 16) + kSmallest);
  for (; i < padded; ++i) upper[i] = kSmallest;
  const Found high = bisect(upper, n, k, 1 << 15);
  const int64_t wanted = k - high.above;
  const uint32_t prefix = static_cast<uint32_t>(high.key) << 16;
  if (wanted == high.equal && prefix > 0) return {prefix - 1, 0};

  const __m256i group = _mm256_set1_epi32(high.key);
  int64_t count = 0;
  for (i = 0; i + 8 <= n; i += 8) {
    const __m256i match = _mm256_cmpeq_epi32(_mm256_srli_epi32(capped(bits_at(x + i)), 16), group);
    uint32_t mask = static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(match)));
    for (; mask != 0; mask &= mask - 1) {
      const int64_t at = i + __builtin_ctz(mask);
      lower[count++] = static_cast<int16_t>(static_cast<int32_t>(key_of(x[at]) & 0xffffu) + kSmallest);
    }
  }
  for (; i < n; ++i) {
    const uint32_t key = key_of(x[i]);
    if (key >> 16 == static_cast<uint32_t>(high.key)) {
      lower[count++] = static_cast<int16_t>(static_cast<int32_t>(key & 0xffffu) + kSmallest);
    }
  }
  for (int64_t j = count; j % 16 != 0; ++j) lower[j] = kSmallest;
  const Found low = bisect(lower, count, wanted, 1 << 16);
  const uint32_t threshold = prefix | static_cast<uint32_t>(low.key);
  if (wanted - low.above == low.equal && threshold > 0) return {threshold - 1, 0};  // no tie is cut
  return {threshold, wanted - low.above};
}

void keep(const float* x, int64_t n, TopKCut cut, float* y) {
  const __m256i infinity = _mm256_set1_epi32(static_cast<int32_t>(kInfinityBits));
  const __m256i threshold = _mm256_set1_epi32(static_cast<int32_t>(cut.threshold));
  const __m256i lane_bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  int64_t ties = cut.ties;
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256i bits = bits_at(x + i);
    const __m256i key = capped(bits);
    __m256i kept = _mm256_or_si256(_mm256_cmpgt_epi32(key, threshold), _mm256_cmpgt_epi32(bits, infinity));
    if (ties > 0) {
      const __m256i tie = _mm256_cmpeq_epi32(key, threshold);
      uint32_t mask = static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(tie)));
      if (mask != 0) {
        const int64_t here = _mm_popcnt_u32(mask);
        uint32_t first = mask;
        for (int64_t excess = here - ties; excess > 0; --excess) first &= ~(1u << (31 - __builtin_clz(first)));
        ties -= here < ties ? here : ties;
        const __m256i chosen = _mm256_and_si256(_mm256_set1_epi32(static_cast<int32_t>(first)), lane_bits);
        kept = _mm256_or_si256(kept, _mm256_cmpeq_epi32(chosen, lane_bits));
      }
    }
    _mm256_storeu_ps(y + i, _mm256_and_ps(_mm256_loadu_ps(x + i), _mm256_castsi256_ps(kept)));
  }
  for (; i < n; ++i) {
    uint32_t bits;
    memcpy(&bits, x + i, sizeof bits);
    bits &= kMagnitudeBits;
    const uint32_t key = bits > kInfinityBits ? kInfinityBits : bits;
    const bool tie = key == cut.threshold && ties > 0;
    ties -= tie;
    y[i] = key > cut.threshold || tie || bits > kInfinityBits ? x[i] : 0.0f;
  }
}

}  // namespace

const TopKKernels topk_avx2 = {select, keep};

}  // namespace qsk
