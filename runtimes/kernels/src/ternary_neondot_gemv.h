// What the variants neondot and neoni8mm share: one row needs no matrix product.
#ifndef QSK_SRC_TERNARY_NEONDOT_GEMV_H_
#define QSK_SRC_TERNARY_NEONDOT_GEMV_H_

#include "ternary_neon_finish.h"

namespace qsk {

// As TernaryKernels::gemv.
void ternary_neondot_gemv(const TernaryRows& rows, int32_t* sums);

namespace {

// bytes[h]: each 32-bit lane holds one row byte of four channels.
inline void interleave(const uint8_t* const rows[4], int64_t column, uint8x16_t bytes[4]) {
  const uint8x16_t a = vld1q_u8(rows[0] + column), b = vld1q_u8(rows[1] + column);
  const uint8x16_t c = vld1q_u8(rows[2] + column), d = vld1q_u8(rows[3] + column);
  const uint16x8_t ab0 = vreinterpretq_u16_u8(vzip1q_u8(a, b)), ab1 = vreinterpretq_u16_u8(vzip2q_u8(a, b));
  const uint16x8_t cd0 = vreinterpretq_u16_u8(vzip1q_u8(c, d)), cd1 = vreinterpretq_u16_u8(vzip2q_u8(c, d));
  bytes[0] = vreinterpretq_u8_u16(vzip1q_u16(ab0, cd0));
  bytes[1] = vreinterpretq_u8_u16(vzip2q_u16(ab0, cd0));
  bytes[2] = vreinterpretq_u8_u16(vzip1q_u16(ab1, cd1));
  bytes[3] = vreinterpretq_u8_u16(vzip2q_u16(ab1, cd1));
}

}  // namespace
}  // namespace qsk

#endif  // QSK_SRC_TERNARY_NEONDOT_GEMV_H_
