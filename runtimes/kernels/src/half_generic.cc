// IEEE binary16 conversions in integer arithmetic.
#include <string.h>

#include "kernels.h"

namespace qsk {
namespace {

float to_float_one(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 0x1fu;
  uint32_t mantissa = half & 0x3ffu;
  uint32_t bits;
  if (exponent == 0x1f) {  // infinity, or NaN made quiet
    bits = sign | kInfinityBits | (mantissa ? (mantissa << 13) | 0x400000u : 0);
  } else if (exponent != 0) {
    bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else if (mantissa == 0) {
    bits = sign;
  } else {  // subnormal: shift the leading one up to where a normal number has its hidden one
    uint32_t shift = 0;
    while (!(mantissa & 0x400u)) {
      mantissa <<= 1;
      ++shift;
    }
    bits = sign | ((113 - shift) << 23) | ((mantissa & 0x3ffu) << 13);
  }
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

uint16_t from_float_one(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & kMagnitudeBits;
  if (magnitude > kInfinityBits) return sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65520, halfway to 65536, rounds to infinity
  if (magnitude >= 0x38800000u) {                       // normal: 2^-14 and above
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return sign | static_cast<uint16_t>((rounded - 0x38000000u) >> 13);
  }
  if (magnitude < 0x33000000u) return sign;        // below 2^-25, half of the smallest subnormal
  const uint32_t shift = 126 - (magnitude >> 23);  // 14..24: bits below the subnormal's unit of 2^-24
  const uint32_t mantissa = (magnitude & 0x7fffffu) | 0x800000u;
  const uint32_t kept = mantissa >> shift;
  const uint32_t rest = mantissa & ((1u << shift) - 1);
  const uint32_t halfway = 1u << (shift - 1);
  return sign | static_cast<uint16_t>(kept + (rest > halfway || (rest == halfway && (kept & 1u))));
}

void to_float(const uint16_t* x, int64_t n, float* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = to_float_one(x[i]);
}

void from_float(const float* x, int64_t n, uint16_t* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = from_float_one(x[i]);
}

}  // namespace

const HalfKernels half_generic = {to_float, from_float};

}  // namespace qsk
