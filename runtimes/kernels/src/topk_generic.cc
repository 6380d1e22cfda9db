// Selection of the k-th largest magnitude by radix, most significant digit first: three passes, no sorting.
#include <string.h>

#include "kernels.h"

namespace qsk {
namespace {

constexpr uint32_t kDigitBits[3] = {11, 11, 9};
constexpr uint32_t kDigitShift[3] = {20, 9, 0};
constexpr uint32_t kBuckets = 1u << 11;

uint32_t magnitude_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits & kMagnitudeBits;
}

uint32_t key_of(float value) {
  const uint32_t magnitude = magnitude_of(value);
  return magnitude > kInfinityBits ? kInfinityBits : magnitude;
}

TopKCut select(const float* x, int64_t n, int64_t k, void*) {
  uint32_t prefix = 0;  // the digits of the k-th largest key found so far
  uint32_t prefix_mask = 0;
  int64_t wanted = k;  // its rank among the keys with that prefix
  for (int digit = 0; digit < 3; ++digit) {
    uint32_t count[kBuckets];
    memset(count, 0, sizeof count);
    const uint32_t digit_mask = (1u << kDigitBits[digit]) - 1;
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t key = key_of(x[i]);
      if ((key & prefix_mask) == prefix) ++count[(key >> kDigitShift[digit]) & digit_mask];
    }
    uint32_t bucket = digit_mask;
    while (count[bucket] < wanted) wanted -= count[bucket--];
    prefix |= bucket << kDigitShift[digit];
    prefix_mask |= digit_mask << kDigitShift[digit];
  }
  return {prefix, wanted};
}

void keep(const float* x, int64_t n, TopKCut cut, float* y) {
  int64_t ties = cut.ties;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t magnitude = magnitude_of(x[i]);
    const uint32_t key = magnitude > kInfinityBits ? kInfinityBits : magnitude;
    const bool tie = key == cut.threshold && ties > 0;
    ties -= tie;
    y[i] = key > cut.threshold || tie || magnitude > kInfinityBits ? x[i] : 0.0f;
  }
}

}  // namespace

const TopKKernels topk_generic = {select, keep};

}  // namespace qsk
