// How the x86 variants with VNNI take one row's active channels: four at a time.
#ifndef QSK_SRC_TERNARY_QUADS_H_
#define QSK_SRC_TERNARY_QUADS_H_

#include "kernels.h"

namespace qsk {
namespace {

// One group of channels: the rows that are read now, and those of the next group.
struct QuadGroup {
  const uint8_t* rows[kGemvRows];
  const uint8_t* next[kGemvRows];
  alignas(4) int8_t activations[kGemvRows];
  int64_t quad_count;
};

inline void set_up(QuadGroup& group, const TernaryRows& rows) {
  group.quad_count = (rows.count + 3) / 4;
  for (int64_t i = 0; i < 4 * group.quad_count; ++i) {
    group.rows[i] = rows.w + rows.index[i < rows.count ? i : rows.count - 1] * rows.row_bytes;
    group.activations[i] = i < rows.count ? rows.value[i] : 0;
  }
  for (int64_t i = 0; i < kGemvRows; ++i) {  // without a next group, what is in the cache already
    group.next[i] = i < rows.next_count ? rows.w + rows.next[i] * rows.row_bytes : group.rows[0];
  }
}

}  // namespace
}  // namespace qsk

#endif  // QSK_SRC_TERNARY_QUADS_H_
