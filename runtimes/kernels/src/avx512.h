// The AVX-512 intrinsics: the compiler's, or, in the test build for machines without AVX-512, SIMDe's emulation.
#ifndef QSK_SRC_AVX512_H_
#define QSK_SRC_AVX512_H_

#if defined(QSK_EMULATE_AVX512)
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#else
#include <immintrin.h>
#endif

#endif  // QSK_SRC_AVX512_H_
