// Products in floating point, portable C++: what the compiler makes of eight lanes.
#include <string.h>

#include "kernels.h"

namespace qsk {
namespace {

struct F8 {
  float lane[8];
};
struct U8 {
  uint32_t lane[8];
};

F8 splat(float x) { return {{x, x, x, x, x, x, x, x}}; }
F8 zero() { return splat(0.0f); }
F8 load(const float* p) {
  F8 v;
  memcpy(v.lane, p, sizeof v.lane);
  return v;
}
void store(float* p, const F8& v) { memcpy(p, v.lane, sizeof v.lane); }
F8 add(const F8& a, const F8& b) {
  F8 v;
  for (int i = 0; i < 8; ++i) v.lane[i] = a.lane[i] + b.lane[i];
  return v;
}
F8 mul(const F8& a, const F8& b) {
  F8 v;
  for (int i = 0; i < 8; ++i) v.lane[i] = a.lane[i] * b.lane[i];
  return v;
}
F8 fma(const F8& a, const F8& b, const F8& c) {  // two roundings: fused ones are slow without an instruction
  F8 v;
  for (int i = 0; i < 8; ++i) v.lane[i] = a.lane[i] * b.lane[i] + c.lane[i];
  return v;
}
F8 load_half(const uint16_t* p) {
  F8 v;
  half_generic.to_float(p, 8, v.lane);
  return v;
}
F8 pick(const float* p, const int32_t* lanes) {
  F8 v;
  for (int i = 0; i < 8; ++i) v.lane[i] = p[lanes[i]];
  return v;
}
float sum(const F8& v) {  // in the order of the vector units
  const float* x = v.lane;
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}
unsigned nonzero(const F8& v) {
  unsigned bits = 0;
  for (int i = 0; i < 8; ++i) bits |= static_cast<unsigned>(v.lane[i] != 0.0f) << i;
  return bits;
}

U8 load_words(const uint8_t* p) {
  U8 v;
  memcpy(v.lane, p, sizeof v.lane);  // little-endian, as every processor that this is built for
  return v;
}
U8 flip(U8 v, uint32_t bits) {
  for (uint32_t& lane : v.lane) lane ^= bits;
  return v;
}
U8 mask(U8 v, uint32_t bits) {
  for (uint32_t& lane : v.lane) lane &= bits;
  return v;
}
U8 upper(U8 v) {
  for (uint32_t& lane : v.lane) lane >>= 16;
  return v;
}
F8 to_float(const U8& v) {
  F8 result;
  for (int i = 0; i < 8; ++i) result.lane[i] = static_cast<float>(static_cast<int32_t>(v.lane[i]));
  return result;
}

struct I8 {
  int32_t lane[8];
};
struct W {  // the halves in the lower 16 bits of each lane
  U8 a, b;
};
struct D {
  int32_t a, b;
};
struct H16 {
  uint16_t lane[16];
};

W pair_first(const uint8_t* a, const uint8_t* b) { return {mask(load_words(a), 0xffff), mask(load_words(b), 0xffff)}; }
W pair_second(const uint8_t* a, const uint8_t* b) { return {upper(load_words(a)), upper(load_words(b))}; }
W flip16(const W& w, uint32_t bits) { return {flip(w.a, bits), flip(w.b, bits)}; }
W mask16(const W& w, uint32_t bits) { return {mask(w.a, bits), mask(w.b, bits)}; }
W down8(W w) {
  for (uint32_t& lane : w.a.lane) lane >>= 8;
  for (uint32_t& lane : w.b.lane) lane >>= 8;
  return w;
}
D fixed_pair(int32_t pair) { return {static_cast<int16_t>(pair), pair >> 16}; }
I8 lower_halves(const I8& first, const I8&) { return first; }
I8 upper_halves(const I8&, const I8& second) { return second; }
I8 splat_int(int32_t x) { return {{x, x, x, x, x, x, x, x}}; }
I8 load_int(const int32_t* p) {
  I8 v;
  memcpy(v.lane, p, sizeof v.lane);
  return v;
}
void store_int(int32_t* p, const I8& v) { memcpy(p, v.lane, sizeof v.lane); }
I8 madd(I8 sums, const W& w, D d) {
  for (int i = 0; i < 8; ++i) {
    sums.lane[i] += static_cast<int32_t>(w.a.lane[i]) * d.a + static_cast<int32_t>(w.b.lane[i]) * d.b;
  }
  return sums;
}
F8 from_int(const I8& v) {
  F8 result;
  for (int i = 0; i < 8; ++i) result.lane[i] = static_cast<float>(v.lane[i]);
  return result;
}
I8 add_halves(const I8& a, const I8& b, const I8& c, const I8& d) {
  const I8* const all[4] = {&a, &b, &c, &d};
  I8 v = {};
  for (int i = 0; i < 8; ++i) {
    for (int j = 0; j < 4; ++j) v.lane[i] += all[i % 4]->lane[i / 4 * 4 + j];
  }
  return v;
}

H16 load_halves(const uint8_t* p) {
  H16 v;
  memcpy(v.lane, p, sizeof v.lane);
  return v;
}
H16 low_bits(H16 h, uint32_t bits) {
  for (uint16_t& lane : h.lane) lane = static_cast<uint16_t>(lane & bits);
  return h;
}
template <int kBits>
H16 shift(H16 h) {
  for (uint16_t& lane : h.lane) lane = static_cast<uint16_t>(lane >> kBits);
  return h;
}
I8 madd_halves(I8 sums, const H16& codes, const int16_t* p) {
  for (int i = 0; i < 8; ++i) sums.lane[i] += codes.lane[2 * i] * p[2 * i] + codes.lane[2 * i + 1] * p[2 * i + 1];
  return sums;
}

void pack_nonzero(const F8& v, int32_t first_index, unsigned bits, int32_t* index, float* value) {
  int count = 0;
  for (int i = 0; i < 8; ++i) {
    index[count] = first_index + i;
    value[count] = v.lane[i];
    count += bits >> i & 1;
    if (count == 8) break;
  }
}

}  // namespace
}  // namespace qsk

#include "dense_rows.h"

namespace qsk {

const FloatKernels float_generic = float_kernels({{1.0f, 0.8f}, {1.0f, 0.8f}, {1.0f, 0.6f}, {1.0f, 0.5f}});

}  // namespace qsk
