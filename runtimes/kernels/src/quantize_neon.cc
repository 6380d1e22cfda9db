// Absmax int8 quantisation, Advanced SIMD.
#include <arm_neon.h>
#include <string.h>

#include "bit_positions.h"
#include "kernels.h"

namespace qsk {
namespace {

uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits & kMagnitudeBits;
}

uint32_t largest_magnitude(const float* x, int64_t n) {
  const uint32x4_t mask = vdupq_n_u32(kMagnitudeBits);
  uint32x4_t a = vdupq_n_u32(0), b = a;
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    a = vmaxq_u32(a, vandq_u32(vreinterpretq_u32_f32(vld1q_f32(x + i)), mask));
    b = vmaxq_u32(b, vandq_u32(vreinterpretq_u32_f32(vld1q_f32(x + i + 4)), mask));
  }
  uint32_t largest = vmaxvq_u32(vmaxq_u32(a, b));
  for (; i < n; ++i) {
    const uint32_t bits = bits_of(x[i]);
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

// Four rounded products, half to even, saturated to int16.
int16x4_t quantize4(const float* x, float32x4_t scale) {
  return vqmovn_s32(vcvtnq_s32_f32(vmulq_f32(scale, vld1q_f32(x))));
}

void quantize(const float* x, int64_t n, float inverse, int8_t* q) {
  const float32x4_t scale = vdupq_n_f32(inverse);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    vst1_s8(q + i, vqmovn_s16(vcombine_s16(quantize4(x + i, scale), quantize4(x + i + 4, scale))));
  }
  if (i < n) {
    float last[8] = {};
    int8_t packed[8];
    memcpy(last, x + i, (n - i) * sizeof *x);
    vst1_s8(packed, vqmovn_s16(vcombine_s16(quantize4(last, scale), quantize4(last + 4, scale))));
    memcpy(q + i, packed, n - i);
  }
}

// The first n of 16 bytes, for 0 <= n <= 16.
uint8x16_t first_bytes(int64_t n) {
  const uint8x16_t position = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return vcltq_u8(position, vdupq_n_u8(static_cast<uint8_t>(n)));
}

uint8x16_t magnitudes(const int8_t* q) { return vreinterpretq_u8_s8(vabsq_s8(vld1q_s8(q))); }
uint8x16_t last_magnitudes(const int8_t* q, int64_t n) { return vandq_u8(magnitudes(q), first_bytes(n < 16 ? n : 16)); }

// How many of n magnitudes are at least `bound`, which is above 0.
int64_t count_at_least(const int8_t* q, int64_t n, int32_t bound) {
  const uint8x16_t limit = vdupq_n_u8(static_cast<uint8_t>(bound));
  int64_t count = 0, i = 0;
  while (i + 32 <= n) {
    constexpr int64_t kMost = 32 * 255;  // what bytes can count
    const int64_t end = n - i > kMost ? i + kMost : n - 31;
    uint8x16_t a = vdupq_n_u8(0), b = a;
    for (; i < end; i += 32) {
      a = vsubq_u8(a, vcgeq_u8(magnitudes(q + i), limit));
      b = vsubq_u8(b, vcgeq_u8(magnitudes(q + i + 16), limit));
    }
    count += vaddlvq_u8(a) + vaddlvq_u8(b);
  }
  for (; i < n; i += 16) count += vaddvq_u8(vshrq_n_u8(vcgeq_u8(last_magnitudes(q + i, n - i), limit), 7));
  return count;
}

QuantizedCut cut(const int8_t* q, int64_t n, int64_t k) {
  int32_t least = 0;
  int64_t reached = n;
  for (int32_t bit = 64; bit != 0 && reached != k; bit >>= 1) {
    const int64_t at_least = count_at_least(q, n, least | bit);
    if (at_least < k) continue;
    least |= bit;
    reached = at_least;
  }
  return {least, reached - k};
}

int64_t find(const int8_t* q, int64_t n, int32_t magnitude, int32_t* position) {
  const uint8x16_t wanted = vdupq_n_u8(static_cast<uint8_t>(magnitude));
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += 16) {
    const uint8x16_t match = vceqq_u8(last_magnitudes(q + i, n - i), wanted);
    // four bits of each byte
    uint64_t mask = vget_lane_u64(vreinterpret_u64_u8(vshrn_n_u16(vreinterpretq_u16_u8(match), 4)), 0);
    mask &= 0x1111111111111111u;
    for (; mask != 0; mask &= mask - 1) {
      position[count++] = static_cast<int32_t>(i) + (__builtin_ctzll(mask) >> 2);
    }
  }
  return count;
}

Tally drop_below(int8_t* q, int64_t n, int32_t least) {
  const uint8x16_t limit = vdupq_n_u8(static_cast<uint8_t>(least));
  int32x4_t sums = vdupq_n_s32(0);
  uint32x4_t active = vdupq_n_u32(0);
  for (int64_t i = 0; i < n; i += 16) {
    const uint8x16_t within = first_bytes(n - i < 16 ? n - i : 16);
    const int8x16_t v = vld1q_s8(q + i);
    const uint8x16_t kept = vandq_u8(vcgeq_u8(magnitudes(q + i), limit), within);
    const int8x16_t left = vandq_s8(v, vreinterpretq_s8_u8(kept));
    vst1q_s8(q + i, vbslq_s8(within, left, v));
    sums = vpadalq_s16(sums, vpaddlq_s8(left));
    active = vpadalq_u16(active, vpaddlq_u8(vshrq_n_u8(kept, 7)));
  }
  return {vaddvq_s32(sums), static_cast<int32_t>(vaddvq_u32(active))};
}

Tally compact(const int8_t* q, int64_t n, int32_t least, int32_t* index, int8_t* value) {
  const uint8x8_t limit = vdup_n_u8(static_cast<uint8_t>(least)), bits = {1, 2, 4, 8, 16, 32, 64, 128};
  int32x4_t sums = vdupq_n_s32(0);
  const int32_t* const begin = index;
  for (int64_t i = 0; i < n; i += 8) {
    const int8x8_t v = vld1_s8(q + i);
    const uint8x8_t kept = vcge_u8(vreinterpret_u8_s8(vabs_s8(v)), limit);
    sums = vpadalq_s16(sums, vmovl_s8(vand_s8(v, vreinterpret_s8_u8(kept))));
    const uint8_t mask = vaddv_u8(vand_u8(kept, bits));
    const uint8x8_t positions = vld1_u8(kBitPositions.of[mask]);
    const uint16x8_t wide = vmovl_u8(positions);
    const uint32x4_t first = vdupq_n_u32(static_cast<uint32_t>(i));
    vst1q_s32(index, vreinterpretq_s32_u32(vaddw_u16(first, vget_low_u16(wide))));
    vst1q_s32(index + 4, vreinterpretq_s32_u32(vaddw_high_u16(first, wide)));
    vst1_s8(value, vtbl1_s8(v, vreinterpret_s8_u8(positions)));
    const int64_t count = vaddv_u8(vshr_n_u8(kept, 7));
    index += count;
    value += count;
  }
  return {vaddvq_s32(sums), static_cast<int32_t>(index - begin)};
}

}  // namespace

const QuantizeKernels quantize_neon = {largest_magnitude, quantize, cut, find, drop_below, compact};

}  // namespace qsk
