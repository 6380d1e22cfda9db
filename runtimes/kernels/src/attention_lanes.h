// Attention over one block of query rows and one chunk of keys; each instruction set includes this once.
#ifndef QSK_SRC_ATTENTION_LANES_H_
#define QSK_SRC_ATTENTION_LANES_H_

#include "kernels.h"
#include "lanes.h"

namespace qsk {
namespace {

// A NaN score must not win or lose: it becomes NaN weights, whatever the largest is.
constexpr float kNothingVisible = -__builtin_inff();

// scores[r * kAttendKeys + j] = q_r . key_j for kRows rows and kKeys keys.
template <int kRows, int kKeys>
QSK_INLINE void dot(const float* q, const float* key, int64_t width, float* scores) {
  Lanes sums[kRows][kKeys];
  QSK_UNROLL for (int r = 0; r < kRows; ++r) { QSK_UNROLL for (int j = 0; j < kKeys; ++j) sums[r][j] = Lanes{}; }
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    QSK_UNROLL for (int j = 0; j < kKeys; ++j) {
      const Lanes k = load(key + j * width + i);
      QSK_UNROLL for (int r = 0; r < kRows; ++r) sums[r][j] += load(q + r * width + i) * k;
    }
  }
  if (i < width) {
    QSK_UNROLL for (int j = 0; j < kKeys; ++j) {
      const Lanes k = load(key + j * width + i, width - i);
      QSK_UNROLL for (int r = 0; r < kRows; ++r) sums[r][j] += load(q + r * width + i, width - i) * k;
    }
  }
  QSK_UNROLL for (int r = 0; r < kRows; ++r) {
    QSK_UNROLL for (int j = 0; j < kKeys; ++j) scores[r * kAttendKeys + j] = sum(sums[r][j]);
  }
}

template <int kRows>
void score_rows(const AttendBlock& block, int64_t row) {
  const float* q = block.q + row * block.width;
  float* scores = block.scores + row * kAttendKeys;
  int64_t j = 0;
  for (; j + 2 <= block.keys; j += 2) dot<kRows, 2>(q, block.key + j * block.width, block.width, scores + j);
  if (j < block.keys) dot<kRows, 1>(q, block.key + j * block.width, block.width, scores + j);
}

// Scores of one row to weights e^(score - largest), 0 where not visible.
void weigh(const AttendBlock& block, int64_t row) {
  float* scores = block.scores + row * kAttendKeys;
  const uint8_t* visible = block.visible[row];
  const int64_t whole = block.keys / kLanes * kLanes, rest = block.keys - whole;
  Lanes best = all(kNothingVisible);
  for (int64_t j = 0; j < whole; j += kLanes) {
    const Lanes seen = set_lanes(visible + j) ? load(scores + j) : all(kNothingVisible);
    best = seen > best ? seen : best;
  }
  if (rest > 0) {
    const Lanes seen = set_lanes(visible + whole, rest) ? load(scores + whole, rest) : all(kNothingVisible);
    best = seen > best ? seen : best;
  }
  float largest = best[0];
  for (int lane = 1; lane < kLanes; ++lane) largest = best[lane] > largest ? best[lane] : largest;
  Lanes total = {};
  for (int64_t j = 0; j < whole; j += kLanes) {
    const Lanes weights = set_lanes(visible + j) ? exp_of_negative(load(scores + j) - largest) : Lanes{};
    store(scores + j, weights);
    total += weights;
  }
  if (rest > 0) {
    const Lanes powers = exp_of_negative(load(scores + whole, rest) - largest);
    const Lanes weights = set_lanes(visible + whole, rest) ? powers : Lanes{};
    store(scores + whole, weights, rest);
    total += weights;
  }
  block.largest[row] = largest;
  block.total[row] = sum(total);
}

// sums += weight * value for kRows rows and kKeys keys, one key after the other.
template <int kRows, int kKeys>
QSK_INLINE void add_values(const float* weights, const float* value, int64_t width, float* sums) {
  Lanes factors[kRows][kKeys];  // few enough to stay in registers
  QSK_UNROLL for (int r = 0; r < kRows; ++r) {
    QSK_UNROLL for (int j = 0; j < kKeys; ++j) factors[r][j] = all(weights[r * kAttendKeys + j]);
  }
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    Lanes y[kRows];
    QSK_UNROLL for (int r = 0; r < kRows; ++r) y[r] = load(sums + r * width + i);
    QSK_UNROLL for (int j = 0; j < kKeys; ++j) {
      const Lanes values = load(value + j * width + i);
      QSK_UNROLL for (int r = 0; r < kRows; ++r) y[r] += factors[r][j] * values;
    }
    QSK_UNROLL for (int r = 0; r < kRows; ++r) store(sums + r * width + i, y[r]);
  }
  for (; i < width; ++i) {
    for (int r = 0; r < kRows; ++r) {
      for (int j = 0; j < kKeys; ++j) sums[r * width + i] += weights[r * kAttendKeys + j] * value[j * width + i];
    }
  }
}

template <int kRows>
void value_rows(const AttendBlock& block, int64_t row) {
  const float* weights = block.scores + row * kAttendKeys;
  float* sums = block.sums + row * block.width;
  int64_t j = 0;
  for (; j + 4 <= block.keys; j += 4) {
    add_values<kRows, 4>(weights + j, block.value + j * block.width, block.width, sums);
  }
  for (; j < block.keys; ++j) {
    add_values<kRows, 1>(weights + j, block.value + j * block.width, block.width, sums);
  }
}

void attend(const AttendBlock& block) {
  int64_t row = 0;
  for (; row + 4 <= block.rows; row += 4) score_rows<4>(block, row);
  for (; row < block.rows; ++row) score_rows<1>(block, row);
  for (row = 0; row < block.rows; ++row) weigh(block, row);
  memset(block.sums, 0, static_cast<size_t>(block.rows * block.width) * sizeof *block.sums);
  for (row = 0; row + 2 <= block.rows; row += 2) value_rows<2>(block, row);
  for (; row < block.rows; ++row) value_rows<1>(block, row);
}

// Two chunks of one row become one: both are scaled to the larger of their largest scores.
void merge(int64_t width, AttendedRow* into, const AttendedRow& other) {
  const float largest = other.largest > into->largest ? other.largest : into->largest;
  if (largest == kNothingVisible) {  // no visible score but NaN in either: -inf - -inf would be NaN where all is hidden
    into->total += other.total;
    for (int64_t i = 0; i < width; ++i) into->sums[i] += other.sums[i];
    return;
  }
  Lanes exponents = {into->largest - largest, other.largest - largest};
  const Lanes factors = exp_of_negative(exponents);
  const float mine = factors[0], theirs = factors[1];
  into->largest = largest;
  into->total = into->total * mine + other.total * theirs;
  for (int64_t i = 0; i < width; ++i) into->sums[i] = into->sums[i] * mine + other.sums[i] * theirs;
}

// y = x turned by the angles of `cosine` and `sine` [width / 2], halves as pairs, then times `factor`.
void rotate(const float* x, const float* cosine, const float* sine, int64_t width, float factor, float* y) {
  const int64_t half = width / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float first = x[i], second = x[i + half];
    y[i] = (cosine[i] * first - sine[i] * second) * factor;
    y[i + half] = (sine[i] * first + cosine[i] * second) * factor;
  }
}

}  // namespace
}  // namespace qsk

#endif  // QSK_SRC_ATTENTION_LANES_H_
