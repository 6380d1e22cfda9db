// The kernel of DenseMatMulNBits, in terms of the vectors of code_rows.h and of H16, sixteen uint16_t, with
//   splat_pair(p): four lanes of p[0], four of p[1]
//   load_halves(p) low_bits(h, bits)     shift<bits>(h): each lane to the right
//   madd_halves(sums, codes, p): sums + the products of codes with the sixteen int16 at p, added in pairs
// and the table of all kernels in floating point.
#ifndef QSK_SRC_DENSE_ROWS_H_
#define QSK_SRC_DENSE_ROWS_H_

#include "code_rows.h"

namespace qsk {
namespace {

// How scales and steps relate. The common ones need no arithmetic inside the loop: a division there takes longer than
// all the rest of a step.
enum class Scales { kForSteps, kForHalfSteps, kAny };

template <int Bits>
Scales scales_for(const DenseRows& rows) {
  if (rows.scales_stride == 1 || rows.group % kDenseStepInputs<Bits> == 0) return Scales::kForSteps;
  return rows.group * 2 == kDenseStepInputs<Bits> ? Scales::kForHalfSteps : Scales::kAny;
}

// Where a step's scales are among those of one output, in float.
template <int Bits, Scales kScales>
struct ScalePosition {
  explicit ScalePosition(const DenseRows& rows)
      : groups(rows.scales_stride),
        group(rows.group),
        steps_per_group(rows.group / kDenseStepInputs<Bits>),
        steps_left(steps_per_group) {}
  void advance() {
    ++step;
    if (kScales == Scales::kForHalfSteps) {
      first += 2;
    } else if (kScales == Scales::kForSteps && first + 1 < groups && --steps_left == 0) {
      ++first;
      steps_left = steps_per_group;
    }
  }
  // The scale of each lane's inputs; lanes beyond the last input get the last scale.
  F8 lanes(const float* scales) const {
    if (kScales == Scales::kForSteps) return splat(scales[first]);
    if (kScales == Scales::kForHalfSteps) {
      return first + 1 < groups ? splat_pair(scales + first) : splat(scales[first]);
    }
    float lane[kLanes];
    for (int64_t j = 0; j < kLanes; ++j) {
      const int64_t of_lane = (step * kDenseStepInputs<Bits> + j * (32 / Bits)) / group;
      lane[j] = scales[of_lane < groups ? of_lane : groups - 1];
    }
    return load(lane);
  }

  int64_t groups, group, steps_per_group, steps_left;
  int64_t step = 0, first = 0;
};

// `count` float16 scales in float.
inline void widen(const uint16_t* scales, int64_t count, float* wide) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(wide + i, load_half(scales + i));
  if (i < count) {
    uint16_t last[kLanes] = {};
    memcpy(last, scales + i, (count - i) * sizeof *scales);
    store(wide + i, load_half(last));
  }
}

template <int Bits>
I8 step_sums(const uint8_t* words, const DenseStep<Bits>& x) {
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
  return sums;
}

constexpr int64_t kAheadBytes = 8 << 10;  // of weights, which lie in order

template <int Bits, Scales kScales>
float dense_output(const DenseRows& rows, const uint8_t* w, const float* scales, const DenseStep<Bits>* x) {
  const int64_t whole_steps = rows.row_bytes / 32;
  F8 total = zero();
  ScalePosition<Bits, kScales> position(rows);
  for (int64_t step = 0; step < whole_steps; ++step, position.advance()) {
    const uint8_t* const words = w + step * 32;
    __builtin_prefetch(words + kAheadBytes);
    const F8 scale = mul(splat(x[step].unit), position.lanes(scales));
    total = add(total, mul(from_int(step_sums<Bits>(words, x[step])), scale));
  }
  if (whole_steps < rows.steps) {
    uint8_t last[32] = {};
    memcpy(last, w + whole_steps * 32, rows.row_bytes - whole_steps * 32);
    const F8 scale = mul(splat(x[whole_steps].unit), position.lanes(scales));
    total = add(total, mul(from_int(step_sums<Bits>(last, x[whole_steps])), scale));
  }
  return sum(total);
}

template <int Bits, Scales kScales>
void dense_outputs(const DenseRows& rows, float* y) {
  const auto* x = static_cast<const DenseStep<Bits>*>(rows.x);
  const int64_t groups = rows.scales_stride;
  for (int64_t n = 0; n < rows.outputs; ++n) {
    const int64_t of_block = n % kDenseBlock;
    if (of_block == 0) {
      const int64_t block = rows.outputs - n < kDenseBlock ? rows.outputs - n : kDenseBlock;
      widen(rows.scales + n * groups, block * groups, rows.wide);
    }
    const uint8_t* const w = rows.w + n * rows.row_bytes;
    for (int64_t row = 0; row < rows.rows; ++row) {
      y[row * rows.y_stride + n] =
          dense_output<Bits, kScales>(rows, w, rows.wide + of_block * groups, x + row * rows.steps);
    }
  }
}

template <int Bits>
void dense(const DenseRows& rows, float* y) {
  switch (scales_for<Bits>(rows)) {
    case Scales::kForSteps:
      return dense_outputs<Bits, Scales::kForSteps>(rows, y);
    case Scales::kForHalfSteps:
      return dense_outputs<Bits, Scales::kForHalfSteps>(rows, y);
    case Scales::kAny:
      return dense_outputs<Bits, Scales::kAny>(rows, y);
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
