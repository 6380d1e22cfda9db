// The order of sums that both NEON variants share, and its way back to the natural order.
//
// Sums: [block of 32 row bytes][half 0..1][h 0..3][plane p 0..3][4], where lane i of a vector belongs to the row byte
// j = 16 half + 4 h + i of the block, and so to the output 4 j + p. st4 of the four planes is the natural order.
#ifndef QSK_SRC_TERNARY_NEON_FINISH_H_
#define QSK_SRC_TERNARY_NEON_FINISH_H_

#include <arm_neon.h>
#include <string.h>

#include "kernels.h"

namespace qsk {
namespace {

constexpr int64_t kHalfBytes = 16;  // of a row: one register
constexpr int64_t kHalfSums = 4 * kHalfBytes;

inline void add_to(int32_t* sums, int32x4_t v) { vst1q_s32(sums, vaddq_s32(vld1q_s32(sums), v)); }

inline void finish_vectors(const int32_t* const* parts, int64_t part_count, int64_t at, int32x4_t offset,
                           float32x4_t factor, float* y) {
  float32x4x4_t planes;
  for (int p = 0; p < 4; ++p) {
    int32x4_t sum = vnegq_s32(offset);
    for (int64_t part = 0; part < part_count; ++part) sum = vaddq_s32(sum, vld1q_s32(parts[part] + at + 4 * p));
    planes.val[p] = vmulq_f32(vcvtq_f32_s32(sum), factor);
  }
  vst4q_f32(y, planes);
}

inline void finish(const int32_t* const* parts, int64_t part_count, int64_t begin, int64_t n, int32_t offset,
                   float factor, float* y) {
  const int32x4_t offsets = vdupq_n_s32(offset);
  const float32x4_t factors = vdupq_n_f32(factor);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) finish_vectors(parts, part_count, begin + i, offsets, factors, y + i);
  if (i < n) {
    float last[16];
    finish_vectors(parts, part_count, begin + i, offsets, factors, last);
    memcpy(y + i, last, (n - i) * sizeof *y);
  }
}

}  // namespace
}  // namespace qsk

#endif  // QSK_SRC_TERNARY_NEON_FINISH_H_
