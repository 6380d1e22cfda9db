// What AVX2 without VNNI can multiply at most on this core, in registers: vpmaddubsw (32 products of bytes) alone, and
// with the vpaddw that each one needs so that its sums go on. Beside qsk_stopwatch's products per cycle this is the
// share of the limit that a prefill reaches. Cycles are those of a chain of dependent additions, one per cycle.
#include <stdint.h>
#include <stdio.h>

#include <algorithm>
#include <chrono>

namespace {

constexpr int kRepeats = 400, kSteps = 1000, kPairs = 48;
constexpr double kProductsPerPair = 32;

template <typename Body>
double least_seconds(Body body) {
  double least = 1e9;
  for (int i = 0; i < kRepeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    for (int step = 0; step < kSteps; ++step) body();
    least = std::min(least, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / kSteps);
  }
  return least;
}

// Twelve sums, as in the kernel of six rows and two vectors.
#define ALL(X) TWELVE(X) TWELVE(X) TWELVE(X) TWELVE(X)
#define TWELVE(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#define REGISTERS \
  "ymm0", "ymm1", "ymm2", "ymm3", "ymm4", "ymm5", "ymm6", "ymm7", "ymm8", "ymm9", "ymm10", "ymm11", "ymm15"
#define PRODUCT(i) "vpmaddubsw %%ymm12, %%ymm13, %%ymm" #i "\n"
#define PRODUCT_AND_SUM(i) "vpmaddubsw %%ymm12, %%ymm13, %%ymm15\nvpaddw %%ymm15, %%ymm" #i ", %%ymm" #i "\n"
#define ADDITION(i) "add $1, %0\n"

void report(const char* what, double seconds, double cycle_seconds) {
  const double products = kPairs * kProductsPerPair;
  printf("%-24s %5.2f cycles each  %6.1f products/cycle  %6.1f GOPS\n", what, seconds / cycle_seconds / kPairs,
         products * cycle_seconds / seconds, 2e-9 * products / seconds);
}

}  // namespace

int main() {
  uint64_t number = 0;  // goes on from step to step: every addition waits for the last one
  const double cycle_seconds = least_seconds([&] { __asm__ volatile(ALL(ADDITION) : "+r"(number)); }) / kPairs;
  printf("%.2f GHz\n", 1e-9 / cycle_seconds);
  report("vpmaddubsw", least_seconds([] { __asm__ volatile(ALL(PRODUCT)::: REGISTERS); }), cycle_seconds);
  report("vpmaddubsw and vpaddw", least_seconds([] {
           __asm__ volatile(ALL(PRODUCT_AND_SUM)::: REGISTERS);
         }),
         cycle_seconds);
  return 0;
}
