// The product that TernaryMatMul and SparseTernaryMatMul share: one or several matrices side by side in long rows.
#ifndef QSK_SRC_TERNARY_PRODUCT_H_
#define QSK_SRC_TERNARY_PRODUCT_H_

#include <stdint.h>

#include "qsk/parallel.h"
#include "qsk/variant.h"
#include "sparsified_row.h"

namespace qsk {

struct TernaryMatrix {
  int64_t begin;    // its first output in the padded row; a multiple of QSK_TERNARY_TILE_OUTPUTS
  int64_t n;        // outputs without padding
  int64_t y_begin;  // its first output in a row of y
  float scale;
};

struct TernaryProduct {
  int type;       // of x and y
  const void* x;  // [m, k]
  const uint8_t* w;
  int64_t row_bytes;
  void* y;  // [m, outputs]
  int64_t m, k, outputs;
  const TernaryMatrix* matrices;
  int64_t matrix_count;
  const Selection* selection;  // before the quantiser; NULL: none
};

constexpr int64_t kLargestTernaryK = 8000000;  // 128 * 2 * k must fit int32

int64_t ternary_product_scratch_bytes(const TernaryProduct& product, const qsk_parallel* parallel);
// The sizes are checked already, the pointers and the scratch here.
int ternary_product(const qsk_variant& variant, const TernaryProduct& product, const qsk_parallel* parallel,
                    void* scratch, int64_t scratch_bytes);

}  // namespace qsk

#endif  // QSK_SRC_TERNARY_PRODUCT_H_
