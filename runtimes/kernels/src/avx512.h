// The AVX-512 intrinsics: the compiler's, or, in the test build for machines without AVX-512, SIMDe's emulation.
#ifndef QSK_SRC_AVX512_H_
#define QSK_SRC_AVX512_H_

#if defined(QSK_EMULATE_VNNI)
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

// Missing in SIMDe 0.7.4.
static inline simde__m512 qsk_emulated_cvtepi32_ps(simde__m512i v) {
  const simde__m256 low = simde_mm256_cvtepi32_ps(simde_mm512_castsi512_si256(v));
  const simde__m256 high = simde_mm256_cvtepi32_ps(simde_mm512_extracti64x4_epi64(v, 1));
  return simde_mm512_insertf32x8(simde_mm512_castps256_ps512(low), high, 1);
}
static inline simde__m512i qsk_emulated_srai_epi32(simde__m512i v, unsigned int bits) {
  const simde__m256i low = simde_mm256_srai_epi32(simde_mm512_castsi512_si256(v), static_cast<int>(bits));
  const simde__m256i high = simde_mm256_srai_epi32(simde_mm512_extracti64x4_epi64(v, 1), static_cast<int>(bits));
  return simde_mm512_inserti64x4(simde_mm512_castsi256_si512(low), high, 1);
}
#define _mm512_cvtepi32_ps qsk_emulated_cvtepi32_ps
#define _mm512_srai_epi32 qsk_emulated_srai_epi32
#else
#include <immintrin.h>
#endif

#endif  // QSK_SRC_AVX512_H_
