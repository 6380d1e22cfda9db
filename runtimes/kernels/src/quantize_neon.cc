// Absmax int8 quantisation, Advanced SIMD.
#include <arm_neon.h>
#include <string.h>

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

int32_t quantize(const float* x, int64_t n, float inverse, int8_t* q) {
  const float32x4_t scale = vdupq_n_f32(inverse);
  int32x4_t sums = vdupq_n_s32(0);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const int16x8_t rounded = vcombine_s16(quantize4(x + i, scale), quantize4(x + i + 4, scale));
    const int8x8_t packed = vqmovn_s16(rounded);
    sums = vpadalq_s16(sums, vmovl_s8(packed));
    vst1_s8(q + i, packed);
  }
  int32_t sum = vaddvq_s32(sums);
  if (i < n) {
    float last[8] = {};
    int8_t packed[8];
    memcpy(last, x + i, (n - i) * sizeof *x);
    vst1_s8(packed, vqmovn_s16(vcombine_s16(quantize4(last, scale), quantize4(last + 4, scale))));
    for (int64_t j = 0; i + j < n; ++j) sum += q[i + j] = packed[j];
  }
  return sum;
}

int64_t compact(const int8_t* q, int64_t n, int32_t* index, int8_t* value) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {  // without a branch: which channels are active is not predictable
    index[count] = static_cast<int32_t>(i);
    value[count] = q[i];
    count += q[i] != 0;
  }
  return count;
}

}  // namespace

const QuantizeKernels quantize_neon = {largest_magnitude, quantize, compact};

}  // namespace qsk
