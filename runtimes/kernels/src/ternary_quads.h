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

inline void set_up(QuadGroup& group, const uint8_t* w, int64_t row_bytes, const int32_t* index, const int8_t* value,
                   int64_t count, const int32_t* next, int64_t next_count) {
  group.quad_count = (count + 3) / 4;
  for (int64_t i = 0; i < 4 * group.quad_count; ++i) {
    group.rows[i] = w + index[i < count ? i : count - 1] * row_bytes;
    group.activations[i] = i < count ? value[i] : 0;
  }
  for (int64_t i = 0; i < kGemvRows; ++i) {  // without a next group, what is in the cache already
    group.next[i] = i < next_count ? w + next[i] * row_bytes : group.rows[0];
  }
}

}  // namespace
}  // namespace qsk

#endif  // QSK_SRC_TERNARY_QUADS_H_
