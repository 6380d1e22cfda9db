#include "cpu.h"

#include <stdint.h>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <stddef.h>
#include <sys/sysctl.h>
#endif

namespace qsk {

bool cpu_has_anything() { return true; }

#if defined(__aarch64__) && defined(__linux__)
namespace {

constexpr unsigned long kHwcap2I8mm = 1ul << 13;  // HWCAP2_I8MM, which kernel headers have since 5.10

}  // namespace
#endif

#if defined(__x86_64__)
namespace {

struct Features {
  bool avx2;
  bool avxvnni;
  bool avx512vnni;
};

// Bits of XCR0: the register states that the operating system saves on a switch.
constexpr uint64_t kXmmYmm = 0x6;
constexpr uint64_t kOpmaskZmm = 0xe0;

constexpr uint32_t kAvxVnni = 1 << 4;  // of leaf 7.1's EAX; GCC 10's cpuid.h has no name for it

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
  const uint32_t last_subleaf = a;
  bool avxvnni = false;
  if (last_subleaf >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) avxvnni = a & kAvxVnni;
  return {avx2, avx2 && avxvnni, avx2 && avx512 && (states & kOpmaskZmm) == kOpmaskZmm};
}

const Features& features() {
  static const Features detected = detect();
  return detected;
}

}  // namespace

bool cpu_has_avx2() { return features().avx2; }
#if defined(QSK_EMULATE_VNNI)
bool cpu_has_avxvnni() { return features().avx2; }
bool cpu_has_avx512vnni() { return features().avx2; }
#else
bool cpu_has_avxvnni() { return features().avxvnni; }
bool cpu_has_avx512vnni() { return features().avx512vnni; }
#endif
#elif defined(__aarch64__) && defined(__linux__)

bool cpu_has_neon() { return getauxval(AT_HWCAP) & HWCAP_ASIMD; }
bool cpu_has_neondot() { return cpu_has_neon() && (getauxval(AT_HWCAP) & HWCAP_ASIMDDP); }
bool cpu_has_neoni8mm() { return cpu_has_neondot() && (getauxval(AT_HWCAP2) & kHwcap2I8mm); }

#elif defined(__aarch64__) && defined(__APPLE__)  // every Mac has Advanced SIMD and the dot product, from M2 on i8mm

bool cpu_has_neon() { return true; }
bool cpu_has_neondot() { return true; }
bool cpu_has_neoni8mm() {
  int has = 0;
  size_t bytes = sizeof has;
  return sysctlbyname("hw.optional.arm.FEAT_I8MM", &has, &bytes, nullptr, 0) == 0 && has != 0;
}

#elif defined(__aarch64__)

bool cpu_has_neon() { return true; }
bool cpu_has_neondot() { return false; }
bool cpu_has_neoni8mm() { return false; }

#endif

}  // namespace qsk
