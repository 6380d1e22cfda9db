#include "cpu.h"

#include <stdint.h>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace qsk {

bool cpu_has_anything() { return true; }

#if defined(__x86_64__)
namespace {

struct Features {
  bool avx2;
  bool avx512vnni;
};

// Bits of XCR0: the register states that the operating system saves on a switch.
constexpr uint64_t kXmmYmm = 0x6;
constexpr uint64_t kOpmaskZmm = 0xe0;

uint64_t saved_states() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

Features detect() {
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return {};
  const bool osxsave = c & bit_OSXSAVE, avx = c & bit_AVX, f16c = c & bit_F16C, fma = c & bit_FMA;
  const bool popcnt = c & bit_POPCNT;
  if (!osxsave || !avx || !f16c || !fma || !popcnt) return {};
  const uint64_t states = saved_states();
  if ((states & kXmmYmm) != kXmmYmm) return {};
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return {};
  const bool avx2 = b & bit_AVX2;
  const bool avx512 = (b & bit_AVX512F) && (b & bit_AVX512BW) && (b & bit_AVX512VL) && (c & bit_AVX512VNNI);
  return {avx2, avx2 && avx512 && (states & kOpmaskZmm) == kOpmaskZmm};
}

const Features& features() {
  static const Features detected = detect();
  return detected;
}

}  // namespace

bool cpu_has_avx2() { return features().avx2; }
#if defined(QSK_EMULATE_AVX512)
bool cpu_has_avx512vnni() { return features().avx2; }
#else
bool cpu_has_avx512vnni() { return features().avx512vnni; }
#endif
bool cpu_has_neon() { return false; }
bool cpu_has_neondot() { return false; }

#elif defined(__aarch64__) && defined(__linux__)

bool cpu_has_avx2() { return false; }
bool cpu_has_avx512vnni() { return false; }
bool cpu_has_neon() { return getauxval(AT_HWCAP) & HWCAP_ASIMD; }
bool cpu_has_neondot() { return cpu_has_neon() && (getauxval(AT_HWCAP) & HWCAP_ASIMDDP); }

#elif defined(__aarch64__)  // Apple: every 64-bit ARM has Advanced SIMD, every Mac the dot product

bool cpu_has_avx2() { return false; }
bool cpu_has_avx512vnni() { return false; }
bool cpu_has_neon() { return true; }
bool cpu_has_neondot() { return true; }

#else

bool cpu_has_avx2() { return false; }
bool cpu_has_avx512vnni() { return false; }
bool cpu_has_neon() { return false; }
bool cpu_has_neondot() { return false; }

#endif

}  // namespace qsk
