// The kernels of integer codes times activations, in terms of the vectors of float_rows.h and of eight-lane I8
// (int32_t) and W, 16 bits of each word of two rows, with the operations
//   pair_low(a, b) pair_high(a, b): the lower and upper halves of the eight words at a and at b
//   flip16(w, bits) mask16(w, bits) down8(w): each half's upper byte     of W
//   fixed_pair(pair): two int16 for every lane     of an int32
//   splat_int(x) load_int(p) store_int(p, v) madd(sums, w, d): sums + w of a * first digit + w of b * second
//   from_int(sums): F8     sum(v): of the eight lanes of F8
//
// Activations are rounded to 16 bits of the largest that is multiplied with them, at most kFloatRows: multiplying
// 16-bit integers takes half the cycles of converting codes and multiplying in float (docs/benchmarks.md). The sums are
// exact, so that every processor has the same bits.
#ifndef QSK_SRC_CODE_ROWS_H_
#define QSK_SRC_CODE_ROWS_H_

#include "float_rows.h"

namespace qsk {
namespace {

constexpr float kLargestFixed = 32767.0f;
constexpr float kLeastMagnitude = 7.888609e-31f;  // 2^-100: below it activations count as zero

// How values up to `largest` become integers of 16 bits, and back.
struct Unit {
  float to_fixed, from_fixed;
};

inline Unit unit_of(float largest) {
  if (largest < kLeastMagnitude) return {0.0f, 0.0f};
  return {kLargestFixed / largest, largest / kLargestFixed};
}

inline int16_t fixed_of(float x, const Unit& unit) {
  return static_cast<int16_t>(static_cast<int32_t>(__builtin_rintf(x * unit.to_fixed)));
}

inline float larger_magnitude(float largest, float x) {
  const float magnitude = __builtin_fabsf(x);
  return magnitude > largest ? magnitude : largest;
}

// The planes of 16 bits: masked where they stand, so that odd planes of 4-bit codes are times 16.
template <int Bits>
struct HalfPlanes {
  static constexpr int kCount = 16 / Bits;
  static constexpr uint32_t kSigns = Bits == 4 ? 0x8888u : 0x8080u;
  static constexpr int32_t factor(int plane) { return Bits == 4 && plane % 2 != 0 ? 16 : 1; }
};

template <int Bits>
W plane_of(W codes, W down, int plane) {
  if (Bits == 8) return plane == 0 ? mask16(codes, 0xff) : down;
  return mask16(plane < 2 ? codes : down, plane % 2 == 0 ? 0x0f : 0xf0);
}

template <int Bits>
void add_planes(W half, D values, I8* sums) {
  const W codes = flip16(half, HalfPlanes<Bits>::kSigns);
  const W down = down8(codes);
  QSK_UNROLL
  for (int p = 0; p < HalfPlanes<Bits>::kCount; ++p) sums[p] = madd(sums[p], plane_of<Bits>(codes, down, p), values);
}

// The rows of a call, all of one group of scales, in fixed point.
struct CodeRows {
  const FloatRows& rows;
  Unit unit;
  int32_t sum;
  int16_t values[kCodeRows + 1];  // and a 0
};

inline void set_up(CodeRows& codes) {
  const FloatRows& rows = codes.rows;
  float largest = 0.0f;
  for (int64_t i = 0; i < rows.count; ++i) largest = larger_magnitude(largest, rows.value[i]);
  codes.unit = unit_of(largest);
  codes.sum = 0;
  for (int64_t i = 0; i < rows.count; ++i) {
    codes.values[i] = fixed_of(rows.value[i], codes.unit);
    codes.sum += codes.values[i];
  }
  codes.values[rows.count] = 0;
}

// One pass over at most kFloatRows rows, in pairs: those from `begin` on. Sums of a call stay integers until its last
// pass, which adds scale * value * weight to `sums`.
template <int Bits, int Pairs>
void add_pass(const CodeRows& codes, int64_t begin, float* sums) {
  constexpr int kHalf = HalfPlanes<Bits>::kCount;
  constexpr int64_t kOutputs = 2 * kLanes * kHalf;
  constexpr int32_t kZero = 1 << (Bits - 1);
  const FloatRows& rows = codes.rows;
  const uint8_t* row[2 * Pairs];
  int32_t pair[Pairs];
  for (int i = 0; i < Pairs; ++i) {
    const int64_t first = begin + 2 * i,
                  second = first + 1 < rows.count ? first + 1 : first;  // with an activation of 0
    row[2 * i] = rows.w + rows.index[first] * rows.row_bytes;
    row[2 * i + 1] = rows.w + rows.index[second] * rows.row_bytes;
    pair[i] = static_cast<int32_t>(static_cast<uint32_t>(static_cast<uint16_t>(codes.values[first])) |
                                   static_cast<uint32_t>(static_cast<uint16_t>(codes.values[first + 1])) << 16);
  }
  const bool is_first = begin == 0, is_last = begin + 2 * Pairs >= rows.count;
  const uint8_t* ahead[kFloatRows];
  const int64_t left = rows.count - begin - 2 * Pairs;
  const int64_t ahead_count = left > 0 ? (left < kFloatRows ? left : kFloatRows) : rows.next_count;
  const int32_t* ahead_index = left > 0 ? rows.index + begin + 2 * Pairs : rows.next;
  for (int64_t i = 0; i < ahead_count; ++i) ahead[i] = rows.w + ahead_index[i] * rows.row_bytes;

  for (int64_t first = 0, byte = 0; first < rows.outputs; first += kOutputs, byte += 32) {
    if (byte % kLineBytes == 0) {
      for (int64_t i = 0; i < ahead_count; ++i) __builtin_prefetch(ahead[i] + byte, 0, 2);
    }
    I8 part[2 * kHalf];
    QSK_UNROLL
    for (int p = 0; p < 2 * kHalf; ++p) {
      part[p] = is_first ? splat_int(-kZero * HalfPlanes<Bits>::factor(p) * codes.sum)
                         : load_int(rows.partial + first + p * kLanes);
    }
    QSK_UNROLL
    for (int i = 0; i < Pairs; ++i) {
      const uint8_t *a = row[2 * i] + byte, *b = row[2 * i + 1] + byte;
      const D values = fixed_pair(pair[i]);
      add_planes<Bits>(pair_low(a, b), values, part);
      add_planes<Bits>(pair_high(a, b), values, part + kHalf);
    }
    if (!is_last) {
      QSK_UNROLL
      for (int p = 0; p < 2 * kHalf; ++p) store_int(rows.partial + first + p * kLanes, part[p]);
      continue;
    }
    QSK_UNROLL
    for (int p = 0; p < 2 * kHalf; ++p) {
      float* out = sums + first + p * kLanes;
      const float unit = codes.unit.from_fixed / static_cast<float>(HalfPlanes<Bits>::factor(p));
      const F8 product = mul(mul(from_int(part[p]), splat(unit)), load_half(rows.scales + first + p * kLanes));
      store(out, add(load(out), product));
    }
  }
}

template <int Bits>
void add_codes(const FloatRows& rows, float* sums) {
  CodeRows codes = {rows, {}, 0, {}};
  set_up(codes);
  for (int64_t begin = 0; begin < rows.count; begin += kFloatRows) {
    switch ((rows.count - begin + 1) / 2) {
      case 1:
        add_pass<Bits, 1>(codes, begin, sums);
        break;
      case 2:
        add_pass<Bits, 2>(codes, begin, sums);
        break;
      case 3:
        add_pass<Bits, 3>(codes, begin, sums);
        break;
      default:
        add_pass<Bits, 4>(codes, begin, sums);
    }
  }
}

}  // namespace
}  // namespace qsk

#endif  // QSK_SRC_CODE_ROWS_H_
