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

void quantize(const float* x, int64_t n, float inverse, int8_t* q) {
  for (int64_t i = 0; i < n; ++i) {
    const float rounded = nearbyintf(inverse * x[i]);
    const float clipped = rounded < -128.0f ? -128.0f : rounded > 127.0f ? 127.0f : rounded;
    q[i] = static_cast<int8_t>(clipped);
  }
}

int32_t magnitude_of(int8_t q) { return q < 0 ? -q : q; }

QuantizedCut cut(const int8_t* q, int64_t n, int64_t k) {
  constexpr int32_t kMagnitudes = 128;
  int64_t count[kMagnitudes] = {};
  for (int64_t i = 0; i < n; ++i) ++count[magnitude_of(q[i])];
  int32_t least = kMagnitudes - 1;
  int64_t reached = count[least];
  while (reached < k) reached += count[--least];
  return {least, reached - k};
}

int64_t find(const int8_t* q, int64_t n, int32_t magnitude, int32_t* position) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (magnitude_of(q[i]) == magnitude) position[count++] = static_cast<int32_t>(i);
  }
  return count;
}

Tally drop_below(int8_t* q, int64_t n, int32_t least) {
  Tally tally = {};
  for (int64_t i = 0; i < n; ++i) {
    if (magnitude_of(q[i]) < least) q[i] = 0;
    tally.sum += q[i];
    tally.active += q[i] != 0;
  }
  return tally;
}

Tally compact(const int8_t* q, int64_t n, int32_t least, int32_t* index, int8_t* value) {
  Tally tally = {};
  for (int64_t i = 0; i < n; ++i) {  // without a branch: which channels are active is not predictable
    const bool kept = magnitude_of(q[i]) >= least;
    index[tally.active] = static_cast<int32_t>(i);
    value[tally.active] = q[i];
    tally.active += kept;
    tally.sum += kept ? q[i] : 0;
  }
  return tally;
}

}  // namespace

const QuantizeKernels quantize_generic = {largest_magnitude, quantize, cut, find, drop_below, compact};

}  // namespace qsk
