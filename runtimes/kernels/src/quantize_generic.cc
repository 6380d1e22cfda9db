// Absmax int8 quantisation, portable.
#include <math.h>
#include <string.h>

#include "kernels.h"

namespace qsk {
namespace {

uint32_t largest_magnitude(const float* x, int64_t n) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    memcpy(&bits, x + i, sizeof bits);
    bits &= kMagnitudeBits;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

int32_t quantize(const float* x, int64_t n, float inverse, int8_t* q) {
  int32_t sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float rounded = nearbyintf(inverse * x[i]);
    const float clipped = rounded < -128.0f ? -128.0f : rounded > 127.0f ? 127.0f : rounded;
    q[i] = static_cast<int8_t>(clipped);
    sum += q[i];
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

const QuantizeKernels quantize_generic = {largest_magnitude, quantize, compact};

}  // namespace qsk
