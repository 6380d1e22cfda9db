// AVX-VNNI's dot product: the compiler's, or, in the test build for machines without it, SIMDe's emulation.
#ifndef QSK_SRC_AVXVNNI_H_
#define QSK_SRC_AVXVNNI_H_

#if defined(QSK_EMULATE_VNNI)
#include <simde/x86/avx512/dpbusd.h>
#define _mm256_dpbusd_avx_epi32(sum, codes, q) simde_mm256_dpbusd_epi32(sum, codes, q)
#else
#include <immintrin.h>
#endif

#endif  // QSK_SRC_AVXVNNI_H_
