// The seam between the drivers of what stands between a layer's products, and their kernels; see kernels.h for the
// rules of such files.
#ifndef QSK_SRC_LAYER_KERNELS_H_
#define QSK_SRC_LAYER_KERNELS_H_

#include <stdint.h>

namespace qsk {

constexpr int64_t kAttendRows = 64;
constexpr int64_t kAttendKeys = 256;

// Query rows against a chunk of keys, all float32. Row r of the result is (largest, total, sums): the largest visible
// score, the sum of weights e^(score - largest), and the weighted sum of values.
struct AttendBlock {
  const float* q;  // [rows, width], turned and scaled
  int64_t rows;    // at most kAttendRows
  const float* key;
  const float* value;  // [keys, width] both
  int64_t keys;        // at most kAttendKeys
  int64_t width;
  const uint8_t* const* visible;  // of each row, [keys], 0 or 1
  float* scores;                  // workspace [rows, kAttendKeys]
  float* largest;                 // [rows]
  float* total;                   // [rows]
  float* sums;                    // [rows, width]
};

struct AttendedRow {
  float largest;
  float total;
  float* sums;
};

// `lanes.h` fixes the order of their operations, so that all variants give the same bits.
struct LayerKernels {
  void (*attend)(const AttendBlock& block);
  void (*merge)(int64_t width, AttendedRow* into, const AttendedRow& other);
  void (*rotate)(const float* x, const float* cosine, const float* sine, int64_t width, float factor, float* y);
  // y = relu(gate)^2 * up, and silu(gate) * up.
  void (*gated_relu2)(const float* gate, const float* up, int64_t n, float* y);
  void (*gated_silu)(const float* gate, const float* up, int64_t n, float* y);
  void (*add)(const float* x, const float* residual, int64_t n, float* y);  // y may be x
  float (*square_sum)(const float* x, int64_t n);
  void (*scale)(const float* x, const float* weight, int64_t n, float factor, float* y);  // (x * factor) * weight
};

extern const LayerKernels layer_generic, layer_avx2, layer_neon;

}  // namespace qsk

#endif  // QSK_SRC_LAYER_KERNELS_H_
