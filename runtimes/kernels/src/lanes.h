// Eight float lanes in the compiler's vector extension: one source that every instruction set compiles for itself, with
// one order of operations and so the same bits everywhere (-ffp-contract=off: no fused multiply-add).
//
// Everything is in an unnamed namespace: each kernel file has its own copy, compiled with its own flags.
#ifndef QSK_SRC_LANES_H_
#define QSK_SRC_LANES_H_

#include <stdint.h>
#include <string.h>

#define QSK_INLINE [[maybe_unused]] inline __attribute__((always_inline))

namespace qsk {
namespace {

constexpr int64_t kLanes = 8;
typedef float Lanes __attribute__((vector_size(32)));
typedef int32_t LaneBits __attribute__((vector_size(32)));

QSK_INLINE Lanes all(float value) { return Lanes{} + value; }

QSK_INLINE Lanes load(const float* x) {
  Lanes y;
  memcpy(&y, x, sizeof y);
  return y;
}

// The first `count` lanes, zeros in the others.
QSK_INLINE Lanes load(const float* x, int64_t count) {
  Lanes y = {};
  memcpy(&y, x, static_cast<size_t>(count) * sizeof *x);
  return y;
}

QSK_INLINE void store(float* y, Lanes x) { memcpy(y, &x, sizeof x); }
QSK_INLINE void store(float* y, Lanes x, int64_t count) { memcpy(y, &x, static_cast<size_t>(count) * sizeof *y); }

// All bits set in the lanes whose byte is not 0; lanes from `count` on are 0.
QSK_INLINE LaneBits set_lanes(const uint8_t* bytes, int64_t count = kLanes) {
  typedef uint8_t Bytes __attribute__((vector_size(8)));
  Bytes eight = {};
  memcpy(&eight, bytes, static_cast<size_t>(count));
  return __builtin_convertvector(eight, LaneBits) != 0;
}

QSK_INLINE float sum(Lanes x) {
  typedef float Half __attribute__((vector_size(16)));
  Half halves[2];
  memcpy(halves, &x, sizeof x);
  const Half y = halves[0] + halves[1];
  return (y[0] + y[2]) + (y[1] + y[3]);
}

// e^x for x <= 0 within 2 units in the last place; 0 below -87, where float32 ends; NaN stays.
// x = n ln 2 + r with ln 2 in two parts, then a polynomial in r: Cephes' expf (Moshier, netlib.org/cephes).
QSK_INLINE Lanes exp_of_negative(Lanes x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const LaneBits vanishes = x < -87.0f;
  const Lanes bounded = vanishes ? all(-87.0f) : x;
  const Lanes shifted = bounded * 1.44269504088896341f + kRound;
  const Lanes n = shifted - kRound;
  const Lanes r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  Lanes y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = (y * (r * r) + r) + 1.0f;
  LaneBits bits;
  memcpy(&bits, &shifted, sizeof bits);
  // The low bits of `shifted` are n, above the bits of kRound; of a NaN they are anything, and y is NaN.
  const LaneBits exponent = ((bits - 0x4b400000 + 127) & 0xff) << 23;
  Lanes power;
  memcpy(&power, &exponent, sizeof power);
  return vanishes ? Lanes{} : y * power;
}

}  // namespace
}  // namespace qsk

#endif  // QSK_SRC_LANES_H_
