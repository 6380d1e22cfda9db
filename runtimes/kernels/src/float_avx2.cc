// Products in floating point, AVX2 with FMA and F16C.
#include <immintrin.h>

#include "kernels.h"

namespace qsk {
namespace {

using F8 = __m256;
using U8 = __m256i;

F8 zero() { return _mm256_setzero_ps(); }
F8 splat(float x) { return _mm256_set1_ps(x); }
F8 load(const float* p) { return _mm256_loadu_ps(p); }
void store(float* p, F8 v) { _mm256_storeu_ps(p, v); }
F8 add(F8 a, F8 b) { return _mm256_add_ps(a, b); }
F8 mul(F8 a, F8 b) { return _mm256_mul_ps(a, b); }
F8 fma(F8 a, F8 b, F8 c) { return _mm256_fmadd_ps(a, b, c); }
F8 load_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
F8 pick(const float* p, const int32_t* lanes) {
  return _mm256_permutevar8x32_ps(load(p), _mm256_load_si256(reinterpret_cast<const __m256i*>(lanes)));
}
float sum(F8 v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
unsigned nonzero(F8 v) {
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NEQ_UQ)));
}

U8 load_words(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
U8 flip(U8 v, uint32_t bits) { return _mm256_xor_si256(v, _mm256_set1_epi32(static_cast<int32_t>(bits))); }
U8 mask(U8 v, uint32_t bits) { return _mm256_and_si256(v, _mm256_set1_epi32(static_cast<int32_t>(bits))); }
U8 upper(U8 v) { return _mm256_srli_epi32(v, 16); }
F8 to_float(U8 v) { return _mm256_cvtepi32_ps(v); }

using I8 = __m256i;
using W = __m256i;
using D = __m256i;
using H16 = __m256i;

W pair_first(const uint8_t* a, const uint8_t* b) { return _mm256_unpacklo_epi16(load_words(a), load_words(b)); }
W pair_second(const uint8_t* a, const uint8_t* b) { return _mm256_unpackhi_epi16(load_words(a), load_words(b)); }
template <int kLanesOfBoth>
I8 shuffle(I8 a, I8 b) {
  return _mm256_castps_si256(_mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), kLanesOfBoth));
}
I8 lower_halves(I8 first, I8 second) { return shuffle<0x88>(first, second); }
I8 upper_halves(I8 first, I8 second) { return shuffle<0xdd>(first, second); }
W flip16(W w, uint32_t bits) { return _mm256_xor_si256(w, _mm256_set1_epi16(static_cast<int16_t>(bits))); }
W mask16(W w, uint32_t bits) { return _mm256_and_si256(w, _mm256_set1_epi16(static_cast<int16_t>(bits))); }
W down8(W w) { return _mm256_srli_epi16(w, 8); }
D fixed_pair(int32_t pair) { return _mm256_set1_epi32(pair); }
I8 splat_int(int32_t x) { return _mm256_set1_epi32(x); }
I8 load_int(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
void store_int(int32_t* p, I8 v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
I8 madd(I8 sums, W w, D d) {
  const __m256i products = _mm256_madd_epi16(w, d);
#if defined(__GNUC__)
  __asm__("vpaddd %1, %0, %0" : "+x"(sums) : "x"(products));  // see add_product in ternary_avx2.cc
  return sums;
#else
  return _mm256_add_epi32(sums, products);
#endif
}
F8 from_int(I8 v) { return _mm256_cvtepi32_ps(v); }
I8 add_pairs(I8 a, I8 b) { return _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b)); }
I8 add_halves(I8 a, I8 b, I8 c, I8 d) {
  const I8 ab = add_pairs(a, b), cd = add_pairs(c, d);
  return _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
}

H16 load_halves(const uint8_t* p) { return load_words(p); }
H16 low_bits(H16 h, uint32_t bits) { return mask16(h, bits); }
template <int kBits>
H16 shift(H16 h) {
  return _mm256_srli_epi16(h, kBits);
}
I8 madd_halves(I8 sums, H16 codes, const int16_t* p) {
  return madd(sums, codes, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// Lane numbers of the set bits, in order: the permutation that packs them.
struct Packing {
  alignas(32) int32_t lanes[256][8];
  constexpr Packing() : lanes{} {
    for (int bits = 0; bits < 256; ++bits) {
      int count = 0;
      for (int lane = 0; lane < 8; ++lane) {
        if (bits >> lane & 1) lanes[bits][count++] = lane;
      }
    }
  }
};
constexpr Packing kPacking;

void pack_nonzero(F8 v, int32_t first_index, unsigned bits, int32_t* index, float* value) {
  const __m256i lanes = _mm256_load_si256(reinterpret_cast<const __m256i*>(kPacking.lanes[bits]));
  _mm256_storeu_ps(value, _mm256_permutevar8x32_ps(v, lanes));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(index), _mm256_add_epi32(lanes, _mm256_set1_epi32(first_index)));
}

}  // namespace
}  // namespace qsk

#include "dense_rows.h"

namespace qsk {

const FloatKernels float_avx2 = float_kernels({{1.0f, 0.8f}, {1.0f, 0.8f}, {1.0f, 0.6f}, {1.0f, 0.5f}});

}  // namespace qsk
