// The kernel of DenseMatMulNBits, and the table of all kernels in floating point, in terms of the vectors of
// float_rows.h and two more operations:
//   load_half_pair(p): two float16, four lanes each     sum(v): of the eight lanes
#ifndef QSK_SRC_DENSE_ROWS_H_
#define QSK_SRC_DENSE_ROWS_H_

#include "float_rows.h"

namespace qsk {
namespace {

// Inputs of a step: 32 bytes of codes. Lane j holds the inputs j * planes .. of the step, plane i of it input i.
template <int Bits>
constexpr int64_t kStepInputs = 256 / Bits;

// The scale of each lane's inputs in the step that begins with `input`; lanes beyond the last input get the last scale.
template <int Bits>
F8 lane_scales(const uint16_t* scales, int64_t groups, int64_t input, int64_t group) {
  const int64_t first = input / group;
  if (group % kStepInputs<Bits> == 0 || first + 1 == groups) {
    const uint16_t twice[2] = {scales[first], scales[first]};
    return load_half_pair(twice);
  }
  if (group * 2 == kStepInputs<Bits>) return load_half_pair(scales + first);
  uint16_t lane[kLanes];
  for (int64_t j = 0; j < kLanes; ++j) {
    const int64_t of_lane = (input + j * Codes<Bits>::kPlanes) / group;
    lane[j] = scales[of_lane < groups ? of_lane : groups - 1];
  }
  return load_half(lane);
}

template <int Bits, int Rows>
void dense_row(const DenseRows& rows, const uint8_t* w, const uint16_t* scales, float* y) {
  using C = Codes<Bits>;
  F8 total[Rows];
  QSK_UNROLL
  for (int r = 0; r < Rows; ++r) total[r] = zero();
  for (int64_t step = 0; step < rows.steps; ++step) {
    uint8_t last[32];
    const uint8_t* words = w + step * 32;
    const int64_t bytes_left = rows.row_bytes - step * 32;
    if (bytes_left < 32) {
      memset(last, 0, sizeof last);
      memcpy(last, words, bytes_left);
      words = last;
    }
    const U8 low = load_words(words);
    const U8 high = upper(low);
    const float* planes = rows.planes + step * kStepInputs<Bits>;
    F8 part[Rows];
    QSK_UNROLL
    for (int r = 0; r < Rows; ++r) part[r] = load(rows.offsets + r * rows.offsets_stride + step * kLanes);
    QSK_UNROLL
    for (int p = 0; p < C::kPlanes; ++p) {
      const F8 codes = to_float(mask(p < C::kHalf ? low : high, C::kCode << (Bits * (p % C::kHalf))));
      QSK_UNROLL
      for (int r = 0; r < Rows; ++r) {
        part[r] = fma(load(planes + r * rows.planes_stride + p * kLanes), codes, part[r]);
      }
    }
    const F8 scale = lane_scales<Bits>(scales, rows.scales_stride, step * kStepInputs<Bits>, rows.group);
    QSK_UNROLL
    for (int r = 0; r < Rows; ++r) total[r] = fma(scale, part[r], total[r]);
  }
  QSK_UNROLL
  for (int r = 0; r < Rows; ++r) y[r * rows.y_stride] = sum(total[r]);
}

template <int Bits, int Rows>
void dense_outputs(const DenseRows& rows, float* y) {
  constexpr int64_t kAhead = 8;  // rows
  for (int64_t n = 0; n < rows.outputs; ++n) {
    const uint8_t* w = rows.w + n * rows.row_bytes;
    if (n + kAhead < rows.outputs) {
      for (int64_t byte = 0; byte < rows.row_bytes; byte += kLineBytes) {
        __builtin_prefetch(w + kAhead * rows.row_bytes + byte);
      }
    }
    dense_row<Bits, Rows>(rows, w, rows.scales + n * rows.scales_stride, y + n);
  }
}

template <int Bits>
void dense(const DenseRows& rows, float* y) {
  DenseRows left = rows;
  for (; left.rows >= 4; left.rows -= 4) {
    dense_outputs<Bits, 4>(left, y);
    left.planes += 4 * left.planes_stride;
    left.offsets += 4 * left.offsets_stride;
    y += 4 * left.y_stride;
  }
  for (; left.rows >= 1; --left.rows) {
    dense_outputs<Bits, 1>(left, y);
    left.planes += left.planes_stride;
    left.offsets += left.offsets_stride;
    y += left.y_stride;
  }
}

constexpr FloatKernels float_kernels(const FloatGemmCost (&cost)[kWeightTypes]) {
  return {{add_floats<Float32>, add_floats<Float16>, add_codes<8>, add_codes<4>},
          {unpack_floats<Float32>, unpack_floats<Float16>, unpack_codes<8>, unpack_codes<4>},
          multiply,
          compact,
          {nullptr, nullptr, dense<8>, dense<4>},
          {cost[0], cost[1], cost[2], cost[3]}};
}

}  // namespace
}  // namespace qsk

#endif  // QSK_SRC_DENSE_ROWS_H_
