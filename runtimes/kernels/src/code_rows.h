// The kernels of integer codes times activations, in terms of the vectors of float_rows.h and of eight-lane I8
// (int32_t) and W, 16 bits of each word of two rows, with the operations
//   pair_first(a, b) pair_second(a, b): the halves of the eight words at a and at b, in two vectors
//   lower_halves(first, second) upper_halves(first, second): the sums of pair_first's and pair_second's in the order of
//   the words, those of their lower halves and those of their upper ones
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
  explicit CodeRows(const FloatRows& given) : rows(given), unit{}, sum(0) {}
  const FloatRows& rows;
  Unit unit;
  int32_t sum;
  int16_t values[kCodeRows];  // set_up writes what is read
};

inline void set_up(CodeRows& codes) {
  const FloatRows& rows = codes.rows;
  int32_t bits = 0;  // of the largest magnitude: those of finite floats compare like integers, several at a time
  for (int64_t i = 0; i < rows.count; ++i) {
    int32_t value;
    memcpy(&value, rows.value + i, sizeof value);
    value &= 0x7fffffff;
    bits = value > bits ? value : bits;
  }
  float largest;
  memcpy(&largest, &bits, sizeof largest);
  codes.unit = unit_of(largest);
  for (int64_t i = 0; i < rows.count; ++i) {
    codes.values[i] = fixed_of(rows.value[i], codes.unit);
    codes.sum += codes.values[i];
  }
}

// Rows that a pass reads together, and what it prefetches meanwhile: the next rows, or all lines from the first to the
// last of them.
struct CodePass {  // set_up writes what is read
  const uint8_t* rows[kFloatRows];
  int32_t pairs[kFloatRows / 2];  // two activations
  int64_t pair_count;
  const uint8_t* next[kFloatRows];
  int64_t next_count;
  const uint8_t* lines;
  int64_t lines_per_step;
};

// Rows of a few lines are over before a hardware prefetcher has begun. Where enough of them are active, fetching all in
// one stream takes less time than fetching these alone.
constexpr int64_t kShortRowBytes = 1024;
constexpr int64_t kMostFetchedPerRow = 9;  // quarters of a row for each active one

// The rows begin..end-1 of a call.
inline void set_up(CodePass& pass, const CodeRows& codes, int64_t begin, int64_t end) {
  const FloatRows& rows = codes.rows;
  const int64_t count = end - begin, left = rows.count - end;
  for (int64_t i = 0; i < count; ++i) pass.rows[i] = rows.w + rows.index[begin + i] * rows.row_bytes;
  if (count % 2 != 0) pass.rows[count] = rows.w + rows.index[end - 1] * rows.row_bytes;  // with an activation of 0
  pass.pair_count = (count + 1) / 2;
  for (int64_t i = 0; i < pass.pair_count; ++i) {
    const auto first = static_cast<uint16_t>(codes.values[begin + 2 * i]);
    const auto second = 2 * i + 1 < count ? static_cast<uint16_t>(codes.values[begin + 2 * i + 1]) : uint16_t{0};
    pass.pairs[i] = static_cast<int32_t>(first | static_cast<uint32_t>(second) << 16);
  }
  const int64_t known = left + rows.next_count;
  pass.next_count = known < kFloatRows ? known : kFloatRows;
  for (int64_t i = 0; i < pass.next_count; ++i) {
    pass.next[i] = rows.w + (i < left ? rows.index[end + i] : rows.next[i - left]) * rows.row_bytes;
  }
  pass.lines = nullptr;
  pass.lines_per_step = 0;
  if (rows.row_bytes >= kShortRowBytes || pass.next_count == 0) return;
  const int64_t span = pass.next[pass.next_count - 1] - pass.next[0] + rows.row_bytes;
  if (span < 0 || 4 * span > kMostFetchedPerRow * pass.next_count * rows.row_bytes) return;
  const int64_t steps = (rows.row_bytes + kLineBytes - 1) / kLineBytes;
  pass.lines = pass.next[0];
  pass.lines_per_step = span / kLineBytes / steps + 1;
  pass.next_count = 0;
}

// Where the passes of a call begin and end: sums stay integers in between.
enum class Begins { kNo, kYes };
enum class Ends { kNo, kYes };

// Adds the codes of 32 bytes of all rows of the pass to the outputs from `first` on. The last pass of a call adds
// scale * value * weight to `sums`.
template <int Bits, Begins kBegins, Ends kEnds>
void add_step(const CodeRows& codes, const CodePass& pass, int64_t first, int64_t byte, const float* units,
              float* sums) {
  constexpr int kHalf = HalfPlanes<Bits>::kCount;
  constexpr int32_t kZero = 1 << (Bits - 1);
  const FloatRows& rows = codes.rows;
  I8 part[2 * kHalf];
  QSK_UNROLL
  for (int p = 0; p < 2 * kHalf; ++p) {
    part[p] = kBegins == Begins::kYes ? splat_int(-kZero * HalfPlanes<Bits>::factor(p) * codes.sum)
                                      : load_int(rows.partial + first + p * kLanes);
  }
  for (int64_t i = 0; i < pass.pair_count; ++i) {
    const uint8_t *a = pass.rows[2 * i] + byte, *b = pass.rows[2 * i + 1] + byte;
    const D values = fixed_pair(pass.pairs[i]);
    add_planes<Bits>(pair_first(a, b), values, part);
    add_planes<Bits>(pair_second(a, b), values, part + kHalf);
  }
  QSK_UNROLL
  for (int p = 0; p < 2 * kHalf; ++p) {
    const int64_t output = first + p * kLanes;
    if (kEnds == Ends::kNo) {
      store_int(rows.partial + output, part[p]);
      continue;
    }
    const I8 whole = p < kHalf ? lower_halves(part[p], part[kHalf + p]) : upper_halves(part[p - kHalf], part[p]);
    const F8 unit = load(units + (HalfPlanes<Bits>::factor(p) == 1 ? 0 : kLanes));
    const F8 product = mul(mul(from_int(whole), unit), load_half(rows.scales + output));
    store(sums + output, add(load(sums + output), product));
  }
}

template <int Bits, Begins kBegins, Ends kEnds>
void add_pass(const CodeRows& codes, const CodePass& pass, float* sums) {
  constexpr int64_t kOutputs = 2 * kLanes * HalfPlanes<Bits>::kCount;
  const FloatRows& rows = codes.rows;
  alignas(32) float units[2 * kLanes];  // of planes times 1, and times 16
  for (int64_t i = 0; i < kLanes; ++i) {
    units[i] = codes.unit.from_fixed;
    units[kLanes + i] = codes.unit.from_fixed / 16.0f;
  }
  const uint8_t* lines = pass.lines;
  for (int64_t first = 0, byte = 0; first < rows.outputs; first += kOutputs, byte += 32) {
    if (byte % kLineBytes == 0) {
      for (int64_t i = 0; i < pass.next_count; ++i) __builtin_prefetch(pass.next[i] + byte, 0, 2);
      for (int64_t i = 0; i < pass.lines_per_step; ++i, lines += kLineBytes) __builtin_prefetch(lines, 0, 2);
    }
    if (kEnds == Ends::kYes && rows.next_scales != nullptr) {
      for (int64_t i = 0; i < kOutputs; i += kLineBytes / 2) __builtin_prefetch(rows.next_scales + first + i, 0, 2);
    }
    add_step<Bits, kBegins, kEnds>(codes, pass, first, byte, units, sums);
  }
}

template <int Bits>
void add_codes(const FloatRows& rows, float* sums) {
  CodeRows codes(rows);
  set_up(codes);
  for (int64_t begin = 0; begin < rows.count; begin += kFloatRows) {
    const int64_t end = begin + kFloatRows < rows.count ? begin + kFloatRows : rows.count;
    const bool begins = begin == 0, ends = end == rows.count;
    CodePass pass;
    set_up(pass, codes, begin, end);
    if (begins && ends) {
      add_pass<Bits, Begins::kYes, Ends::kYes>(codes, pass, sums);
    } else if (begins) {
      add_pass<Bits, Begins::kYes, Ends::kNo>(codes, pass, sums);
    } else if (ends) {
      add_pass<Bits, Begins::kNo, Ends::kYes>(codes, pass, sums);
    } else {
      add_pass<Bits, Begins::kNo, Ends::kNo>(codes, pass, sums);
    }
  }
}

}  // namespace
}  // namespace qsk

#endif  // QSK_SRC_CODE_ROWS_H_
