// The element-wise kernels between matrix products; each instruction set includes this once.
#ifndef QSK_SRC_ROWS_LANES_H_
#define QSK_SRC_ROWS_LANES_H_

#include "kernels.h"
#include "lanes.h"

namespace qsk {
namespace {

QSK_INLINE Lanes relu2(Lanes gate, Lanes up) {
  const Lanes positive = gate < 0.0f ? Lanes{} : gate;  // a NaN stays
  return (positive * positive) * up;
}

// x / (1 + e^-x), written so that the exponential never overflows.
QSK_INLINE Lanes silu(Lanes gate, Lanes up) {
  const LaneBits negative = gate < 0.0f;
  const Lanes power = exp_of_negative(negative ? gate : -gate);
  const Lanes numerator = negative ? power : all(1.0f);
  return (gate * (numerator / (1.0f + power))) * up;
}

void gated_relu2(const float* gate, const float* up, int64_t n, float* y) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, relu2(load(gate + i), load(up + i)));
  if (i < n) store(y + i, relu2(load(gate + i, n - i), load(up + i, n - i)), n - i);
}

void gated_silu(const float* gate, const float* up, int64_t n, float* y) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, silu(load(gate + i), load(up + i)));
  if (i < n) store(y + i, silu(load(gate + i, n - i), load(up + i, n - i)), n - i);
}

void add(const float* x, const float* residual, int64_t n, float* y) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(y + i, load(x + i) + load(residual + i));
  for (; i < n; ++i) y[i] = x[i] + residual[i];
}

float square_sum(const float* x, int64_t n) {
  Lanes sums[2] = {};  // two chains: an addition takes four cycles
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    const Lanes first = load(x + i), second = load(x + i + kLanes);
    sums[0] += first * first;
    sums[1] += second * second;
  }
  for (; i < n; i += kLanes) {
    const Lanes rest = n - i < kLanes ? load(x + i, n - i) : load(x + i);
    sums[0] += rest * rest;
  }
  return sum(sums[0] + sums[1]);
}

void scale(const float* x, const float* weight, int64_t n, float factor, float* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = (x[i] * factor) * weight[i];
}

}  // namespace
}  // namespace qsk

#endif  // QSK_SRC_ROWS_LANES_H_
