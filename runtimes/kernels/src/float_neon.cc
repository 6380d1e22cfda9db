// Products in floating point, Advanced SIMD (part of every 64-bit ARM).
#include <arm_neon.h>
#include <string.h>

#include "kernels.h"

namespace qsk {
namespace {

struct F8 {
  float32x4_t low, high;
};
struct U8 {
  uint32x4_t low, high;
};

F8 splat(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
F8 zero() { return splat(0.0f); }
F8 load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
void store(float* p, F8 v) {
  vst1q_f32(p, v.low);
  vst1q_f32(p + 4, v.high);
}
F8 add(F8 a, F8 b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
F8 mul(F8 a, F8 b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
F8 fma(F8 a, F8 b, F8 c) { return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)}; }
F8 load_half(const uint16_t* p) {
  const float16x8_t halves = vreinterpretq_f16_u16(vld1q_u16(p));
  return {vcvt_f32_f16(vget_low_f16(halves)), vcvt_f32_f16(vget_high_f16(halves))};
}
F8 pick(const float* p, const int32_t* lanes) {
  const float lane[8] = {p[lanes[0]], p[lanes[1]], p[lanes[2]], p[lanes[3]],
                         p[lanes[4]], p[lanes[5]], p[lanes[6]], p[lanes[7]]};
  return load(lane);
}
float sum(F8 v) {
  const float32x4_t four = vaddq_f32(v.low, v.high);
  const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
  return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
unsigned nonzero(F8 v) {
  static const uint32_t kBits[8] = {1, 2, 4, 8, 16, 32, 64, 128};
  const uint32x4_t low = vbicq_u32(vld1q_u32(kBits), vceqq_f32(v.low, vdupq_n_f32(0.0f)));
  const uint32x4_t high = vbicq_u32(vld1q_u32(kBits + 4), vceqq_f32(v.high, vdupq_n_f32(0.0f)));
  return vaddvq_u32(vorrq_u32(low, high));
}

U8 load_words(const uint8_t* p) { return {vreinterpretq_u32_u8(vld1q_u8(p)), vreinterpretq_u32_u8(vld1q_u8(p + 16))}; }
U8 flip(U8 v, uint32_t bits) { return {veorq_u32(v.low, vdupq_n_u32(bits)), veorq_u32(v.high, vdupq_n_u32(bits))}; }
U8 mask(U8 v, uint32_t bits) { return {vandq_u32(v.low, vdupq_n_u32(bits)), vandq_u32(v.high, vdupq_n_u32(bits))}; }
U8 upper(U8 v) { return {vshrq_n_u32(v.low, 16), vshrq_n_u32(v.high, 16)}; }
F8 to_float(U8 v) { return {vcvtq_f32_u32(v.low), vcvtq_f32_u32(v.high)}; }

struct I8 {
  int32x4_t low, high;
};
struct W {  // what is masked or shifted stands in the lower 16 bits of each lane
  U8 a, b;
};
struct D {
  int32_t a, b;
};
struct H16 {
  uint16x8_t low, high;
};

W pair_first(const uint8_t* a, const uint8_t* b) { return {mask(load_words(a), 0xffff), mask(load_words(b), 0xffff)}; }
W pair_second(const uint8_t* a, const uint8_t* b) { return {upper(load_words(a)), upper(load_words(b))}; }
W flip16(W w, uint32_t bits) { return {flip(w.a, bits), flip(w.b, bits)}; }
W mask16(W w, uint32_t bits) { return {mask(w.a, bits), mask(w.b, bits)}; }
U8 down8(U8 v) { return {vshrq_n_u32(v.low, 8), vshrq_n_u32(v.high, 8)}; }
W down8(W w) { return {down8(w.a), down8(w.b)}; }
D fixed_pair(int32_t pair) { return {static_cast<int16_t>(pair), pair >> 16}; }
I8 lower_halves(I8 first, I8) { return first; }
I8 upper_halves(I8, I8 second) { return second; }
I8 splat_int(int32_t x) { return {vdupq_n_s32(x), vdupq_n_s32(x)}; }
I8 load_int(const int32_t* p) { return {vld1q_s32(p), vld1q_s32(p + 4)}; }
void store_int(int32_t* p, I8 v) {
  vst1q_s32(p, v.low);
  vst1q_s32(p + 4, v.high);
}
I8 madd_one(I8 sums, U8 v, int32_t digit) {
  return {vmlaq_n_s32(sums.low, vreinterpretq_s32_u32(v.low), digit),
          vmlaq_n_s32(sums.high, vreinterpretq_s32_u32(v.high), digit)};
}
I8 madd(I8 sums, W w, D d) { return madd_one(madd_one(sums, w.a, d.a), w.b, d.b); }
F8 from_int(I8 v) { return {vcvtq_f32_s32(v.low), vcvtq_f32_s32(v.high)}; }
I8 add_halves(I8 a, I8 b, I8 c, I8 d) {
  return {vpaddq_s32(vpaddq_s32(a.low, b.low), vpaddq_s32(c.low, d.low)),
          vpaddq_s32(vpaddq_s32(a.high, b.high), vpaddq_s32(c.high, d.high))};
}

H16 load_halves(const uint8_t* p) {
  return {vreinterpretq_u16_u8(vld1q_u8(p)), vreinterpretq_u16_u8(vld1q_u8(p + 16))};
}
H16 low_bits(H16 h, uint32_t bits) {
  const uint16x8_t wanted = vdupq_n_u16(static_cast<uint16_t>(bits));
  return {vandq_u16(h.low, wanted), vandq_u16(h.high, wanted)};
}
template <int kBits>
H16 shift(H16 h) {
  return {vshrq_n_u16(h.low, kBits), vshrq_n_u16(h.high, kBits)};
}
int32x4_t pair_products(uint16x8_t codes, int16x8_t digits) {
  const int16x8_t signed_codes = vreinterpretq_s16_u16(codes);
  return vpaddq_s32(vmull_s16(vget_low_s16(signed_codes), vget_low_s16(digits)), vmull_high_s16(signed_codes, digits));
}
I8 madd_halves(I8 sums, H16 codes, const int16_t* p) {
  return {vaddq_s32(sums.low, pair_products(codes.low, vld1q_s16(p))),
          vaddq_s32(sums.high, pair_products(codes.high, vld1q_s16(p + 8)))};
}

void pack_nonzero(F8 v, int32_t first_index, unsigned bits, int32_t* index, float* value) {
  float lane[8];
  store(lane, v);
  int count = 0;
  for (int i = 0; i < 8; ++i) {
    index[count] = first_index + i;
    value[count] = lane[i];
    count += bits >> i & 1;
    if (count == 8) break;
  }
}

}  // namespace
}  // namespace qsk

#include "dense_rows.h"

namespace qsk {

const FloatKernels float_neon = float_kernels({{1.0f, 0.8f}, {1.0f, 0.8f}, {1.0f, 0.6f}, {1.0f, 0.5f}});

}  // namespace qsk
