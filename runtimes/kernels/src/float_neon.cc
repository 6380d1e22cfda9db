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
F8 fma(F8 a, F8 b, F8 c) { return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)}; }
F8 load_half(const uint16_t* p) {
  const float16x8_t halves = vreinterpretq_f16_u16(vld1q_u16(p));
  return {vcvt_f32_f16(vget_low_f16(halves)), vcvt_f32_f16(vget_high_f16(halves))};
}
F8 load_half_pair(const uint16_t* p) {
  const uint16x4_t low = vdup_n_u16(p[0]), high = vdup_n_u16(p[1]);
  return {vcvt_f32_f16(vreinterpret_f16_u16(low)), vcvt_f32_f16(vreinterpret_f16_u16(high))};
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
