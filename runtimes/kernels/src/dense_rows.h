// The kernel of DenseMatMulNBits, in terms of the vectors of code_rows.h and of H16, sixteen uint16_t, with
//   load_halves(p) low_bits(h, bits)     shift<bits>(h): each lane to the right
//   madd_halves(sums, codes, p): sums + the products of codes with the sixteen int16 at p, added in pairs
// and the table of all kernels in floating point.
#ifndef QSK_SRC_DENSE_ROWS_H_
#define QSK_SRC_DENSE_ROWS_H_

#include "code_rows.h"

namespace qsk {
namespace {

// The scale of each lane's inputs in the step that begins with `input`; lanes beyond the last input get the last scale.
template <int Bits>
F8 lane_scales(const uint16_t* scales, int64_t groups, int64_t input, int64_t group) {
  const int64_t first = input / group;
  if (group % kDenseStepInputs<Bits> == 0 || first + 1 == groups) {
    const uint16_t twice[2] = {scales[first], scales[first]};
    return load_half_pair(twice);
  }
  if (group * 2 == kDenseStepInputs<Bits>) return load_half_pair(scales + first);
  uint16_t lane[kLanes];
  for (int64_t j = 0; j < kLanes; ++j) {
    const int64_t of_lane = (input + j * (32 / Bits)) / group;
    lane[j] = scales[of_lane < groups ? of_lane : groups - 1];
  }
  return load_half(lane);
}

template <int Bits>
F8 step_product(const uint8_t* words, const DenseStep<Bits>& x) {
  const H16 codes = load_halves(words);
  I8 sums = load_int(x.offset);
  if constexpr (Bits == 4) {
    sums = madd_halves(sums, low_bits(codes, 0x0f), x.values[0]);
    sums = madd_halves(sums, low_bits(shift<4>(codes), 0x0f), x.values[1]);
    sums = madd_halves(sums, low_bits(shift<8>(codes), 0x0f), x.values[2]);
    sums = madd_halves(sums, shift<12>(codes), x.values[3]);
  } else {
    sums = madd_halves(sums, low_bits(codes, 0xff), x.values[0]);
    sums = madd_halves(sums, shift<8>(codes), x.values[1]);
  }
  return mul(from_int(sums), splat(x.unit));
}

template <int Bits>
float dense_row(const DenseRows& rows, const uint8_t* w, const uint16_t* scales, const DenseStep<Bits>* x) {
  F8 total = zero();
  for (int64_t step = 0; step < rows.steps; ++step) {
    uint8_t last[32];
    const uint8_t* words = w + step * 32;
    const int64_t bytes_left = rows.row_bytes - step * 32;
    if (bytes_left < 32) {
      memset(last, 0, sizeof last);
      memcpy(last, words, bytes_left);
      words = last;
    }
    const F8 scale = lane_scales<Bits>(scales, rows.scales_stride, step * kDenseStepInputs<Bits>, rows.group);
    total = add(total, mul(step_product<Bits>(words, x[step]), scale));
  }
  return sum(total);
}

template <int Bits>
void dense(const DenseRows& rows, float* y) {
  constexpr int64_t kAhead = 8;  // rows of weights
  const auto* x = static_cast<const DenseStep<Bits>*>(rows.x);
  for (int64_t n = 0; n < rows.outputs; ++n) {
    const uint8_t* w = rows.w + n * rows.row_bytes;
    if (n + kAhead < rows.outputs) {
      for (int64_t byte = 0; byte < rows.row_bytes; byte += kLineBytes) {
        __builtin_prefetch(w + kAhead * rows.row_bytes + byte);
      }
    }
    for (int64_t row = 0; row < rows.rows; ++row) {
      y[row * rows.y_stride + n] = dense_row<Bits>(rows, w, rows.scales + n * rows.scales_stride, x + row * rows.steps);
    }
  }
}

// Lays out the inputs of one row of x for `dense`: fixed-point values in the order of the planes, and what the zero
// points add.
template <int Bits>
void lay_out_x(const float* x, int64_t k, int64_t steps, void* laid_out) {
  constexpr int kPlanes = 16 / Bits;  // of a half word
  constexpr int32_t kZero = 1 << (Bits - 1);
  auto* out = static_cast<DenseStep<Bits>*>(laid_out);
  for (int64_t step = 0; step < steps; ++step, ++out) {
    const int64_t begin = step * kDenseStepInputs<Bits>;
    const int64_t end = begin + kDenseStepInputs<Bits> < k ? begin + kDenseStepInputs<Bits> : k;
    float largest = 0.0f;
    for (int64_t i = begin; i < end; ++i) largest = larger_magnitude(largest, x[i]);
    memset(out, 0, sizeof *out);
    const Unit unit = unit_of(largest);
    out->unit = unit.from_fixed;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t half = (i - begin) / kPlanes, plane = (i - begin) % kPlanes;
      const int16_t value = fixed_of(x[i], unit);
      out->values[plane][half] = value;
      out->offset[half / 2] -= kZero * value;
    }
  }
}

constexpr FloatKernels float_kernels(const FloatGemmCost (&cost)[kWeightTypes]) {
  return {{add_floats<Float32>, add_floats<Float16>, add_codes<8>, add_codes<4>},
          {unpack_floats<Float32>, unpack_floats<Float16>, unpack_codes<8>, unpack_codes<4>},
          multiply,
          compact,
          {nullptr, nullptr, lay_out_x<8>, lay_out_x<4>},
          {nullptr, nullptr, dense<8>, dense<4>},
          {cost[0], cost[1], cost[2], cost[3]}};
}

}  // namespace
}  // namespace qsk

#endif  // QSK_SRC_DENSE_ROWS_H_
