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
F8 fma(F8 a, F8 b, F8 c) { return _mm256_fmadd_ps(a, b, c); }
F8 load_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
F8 load_half_pair(const uint16_t* p) {
  const __m128i each_four_times = _mm_setr_epi8(0, 1, 0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3, 2, 3);
  return _mm256_cvtph_ps(_mm_shuffle_epi8(_mm_loadu_si32(p), each_four_times));
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
