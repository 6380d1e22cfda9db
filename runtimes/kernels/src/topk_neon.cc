// Selection of the k-th largest magnitude, Advanced SIMD: the upper 16 bits of it by bisection, counting all keys at
// each step, 8 at a time; then the lower 16 bits among the few keys that share the upper ones.
#include <arm_neon.h>
#include <string.h>

#include "kernels.h"

namespace qsk {
namespace {

uint32x4_t bits_at(const float* x) {
  return vandq_u32(vreinterpretq_u32_f32(vld1q_f32(x)), vdupq_n_u32(kMagnitudeBits));
}

uint32x4_t capped(uint32x4_t bits) { return vminq_u32(bits, vdupq_n_u32(kInfinityBits)); }

uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits & kMagnitudeBits;
}

uint32_t key_of(float value) {
  const uint32_t bits = bits_of(value);
  return bits > kInfinityBits ? kInfinityBits : bits;
}

// How many of the first `vector_count` * 8 keys are at least `bound`.
int64_t count_at_least(const uint16_t* keys, int64_t vector_count, uint16_t bound) {
  const uint16x8_t limit = vdupq_n_u16(bound);
  uint32_t total = 0;
  for (int64_t begin = 0; begin < vector_count;) {
    const int64_t end = begin + 65534 < vector_count ? begin + 65534 : vector_count;  // what uint16 lanes can count
    uint16x8_t a = vdupq_n_u16(0), b = a;
    int64_t i = begin;
    for (; i + 2 <= end; i += 2) {
      a = vsubq_u16(a, vcgeq_u16(vld1q_u16(keys + 8 * i), limit));
      b = vsubq_u16(b, vcgeq_u16(vld1q_u16(keys + 8 * i + 8), limit));
    }
    if (i < end) a = vsubq_u16(a, vcgeq_u16(vld1q_u16(keys + 8 * i), limit));
    total += vaddlvq_u16(a) + vaddlvq_u16(b);
    begin = end;
  }
  return total;
}

struct Found {
  uint32_t key;
  int64_t above;  // keys above it
  int64_t equal;  // keys that equal it; when those at or above it are exactly the wanted, they all may count as equal
};

// The `wanted`-th largest of `count` keys below `end`, a power of two; 0 < wanted <= count. Padded with zeros to 8.
Found bisect(const uint16_t* keys, int64_t count, int64_t wanted, uint32_t end) {
  const int64_t vector_count = (count + 7) / 8;
  uint32_t key = 0;
  int64_t at_least = count;
  int64_t above = 0;
  for (uint32_t bit = end >> 1; bit != 0; bit >>= 1) {
    const uint32_t candidate = key | bit;
    const int64_t reached = count_at_least(keys, vector_count, static_cast<uint16_t>(candidate));
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
  const int64_t padded = (n + 7) / 8 * 8;
  uint16_t* upper = static_cast<uint16_t*>(scratch);
  uint16_t* lower = upper + padded;
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const uint16x4_t a = vshrn_n_u32(capped(bits_at(x + i)), 16);
    const uint16x4_t b = vshrn_n_u32(capped(bits_at(x + i + 4)), 16);
    vst1q_u16(upper + i, vcombine_u16(a, b));
  }
  for (; i < n; ++i) upper[i] = static_cast<uint16_t>(key_of(x[i]) >> 16);
  for (; i < padded; ++i) upper[i] = 0;
  const Found high = bisect(upper, n, k, 1u << 15);
  const int64_t wanted = k - high.above;
  const uint32_t prefix = high.key << 16;
  if (wanted == high.equal && prefix > 0) return {prefix - 1, 0};

  int64_t count = 0;
  for (i = 0; i < n; ++i) {  // without a branch
    const uint32_t key = key_of(x[i]);
    lower[count] = static_cast<uint16_t>(key);
    count += key >> 16 == high.key;
  }
  for (int64_t j = count; j % 8 != 0; ++j) lower[j] = 0;
  const Found low = bisect(lower, count, wanted, 1u << 16);
  const uint32_t threshold = prefix | low.key;
  if (wanted - low.above == low.equal && threshold > 0) return {threshold - 1, 0};  // no tie is cut
  return {threshold, wanted - low.above};
}

void keep(const float* x, int64_t n, TopKCut cut, float* y) {
  const uint32x4_t threshold = vdupq_n_u32(cut.threshold), infinity = vdupq_n_u32(kInfinityBits);
  int64_t ties = cut.ties;
  int64_t i = 0;
  while (i < n) {
    if (ties == 0 && i + 4 <= n) {
      const uint32x4_t bits = bits_at(x + i);
      const uint32x4_t kept = vorrq_u32(vcgtq_u32(capped(bits), threshold), vcgtq_u32(bits, infinity));
      vst1q_f32(y + i, vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(vld1q_f32(x + i)), kept)));
      i += 4;
      continue;
    }
    const uint32_t bits = bits_of(x[i]), key = key_of(x[i]);
    const bool tie = key == cut.threshold && ties > 0;
    ties -= tie;
    y[i] = key > cut.threshold || tie || bits > kInfinityBits ? x[i] : 0.0f;
    ++i;
  }
}

}  // namespace

const TopKKernels topk_neon = {select, keep};

}  // namespace qsk
