// IEEE binary16 conversions, Advanced SIMD (part of every 64-bit ARM).
#include <arm_neon.h>
#include <string.h>

#include "kernels.h"

namespace qsk {
namespace {

void to_float(const uint16_t* x, int64_t n, float* y) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) vst1q_f32(y + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x + i))));
  if (i < n) {
    uint16_t last[4] = {};
    float converted[4];
    memcpy(last, x + i, (n - i) * sizeof *x);
    vst1q_f32(converted, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(last))));
    memcpy(y + i, converted, (n - i) * sizeof *y);
  }
}

void from_float(const float* x, int64_t n, uint16_t* y) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) vst1_u16(y + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(x + i))));
  if (i < n) {
    float last[4] = {};
    uint16_t converted[4];
    memcpy(last, x + i, (n - i) * sizeof *x);
    vst1_u16(converted, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(last))));
    memcpy(y + i, converted, (n - i) * sizeof *y);
  }
}

}  // namespace

const HalfKernels half_neon = {to_float, from_float};

}  // namespace qsk
