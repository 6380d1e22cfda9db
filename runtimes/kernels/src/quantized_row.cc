// Selection and quantiser in one: the quantiser is monotone in |x|, so the k-th largest |q| bounds the selection to the
// few channels that share it, and only those are compared as floats. The largest |x| is always among the kept, so gamma
// is the whole row's.
#include "quantized_row.h"

#include <math.h>
#include <string.h>

#include "work.h"

namespace qsk {
namespace {

constexpr float kGammaFloor = 1e-5f;

float to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

uint32_t key_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits & kMagnitudeBits;
}

float quantize_with_gamma_of(const QuantizeKernels& kernels, uint32_t magnitude, const float* x, int64_t n, int8_t* q) {
  if (magnitude >= kInfinityBits) {
    memset(q, 0, n);
    return NAN;
  }
  const float gamma = to_float(magnitude) < kGammaFloor ? kGammaFloor : to_float(magnitude);
  kernels.quantize(x, n, 127.0f / gamma, q);
  return gamma;
}

// What it takes to decide among channels that are quantised alike.
struct Alike {
  int32_t* position;
  float* value;
  void* select;
};

int64_t unit_of(const Selection& selection, int64_t n) { return selection.block > 0 ? min_of(selection.block, n) : n; }

Alike take_alike(Scratch& scratch, const Selection& selection, int64_t n) {
  const int64_t most = unit_of(selection, n);
  return {scratch.take<int32_t>(most), scratch.take<float>(most), scratch.take<uint8_t>(select_bytes(selection, n))};
}

// Zeroes `excess` of the q whose magnitude is `least`: those with the smallest |x|, the last ones among equals.
void drop_excess(const QuantizeKernels& kernels, const TopKKernels& topk, const float* x, int64_t n, QuantizedCut cut,
                 const Alike& alike, int8_t* q) {
  const int64_t count = kernels.find(q, n, cut.least, alike.position);
  for (int64_t i = 0; i < count; ++i) alike.value[i] = x[alike.position[i]];
  TopKCut kept = topk.select(alike.value, count, count - cut.excess, alike.select);
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t key = key_of(alike.value[i]);
    const bool is_tie = key == kept.threshold && kept.ties > 0;
    kept.ties -= is_tie;
    if (key <= kept.threshold && !is_tie) q[alike.position[i]] = 0;
  }
}

}  // namespace

float quantize_row(const QuantizeKernels& kernels, const float* x, int64_t n, int8_t* q) {
  return quantize_with_gamma_of(kernels, kernels.largest_magnitude(x, n), x, n, q);
}

int64_t quantize_selected_bytes(const Selection& selection, int64_t n) {
  Scratch scratch(nullptr);
  take_alike(scratch, selection, n);
  return scratch.used();
}

QuantizedRow quantize_selected_row(const QuantizeKernels& kernels, const TopKKernels& topk, const Selection& selection,
                                   const float* x, int64_t n, void* scratch, int8_t* q) {
  const uint32_t magnitude = kernels.largest_magnitude(x, n);
  if (selection.k == 0 && magnitude <= kInfinityBits) {  // not even infinity is kept
    memset(q, 0, n);
    return {kGammaFloor, 1};
  }
  const float gamma = quantize_with_gamma_of(kernels, magnitude, x, n, q);
  if (isnan(gamma)) return {gamma, 1};
  Scratch pieces(scratch);
  const Alike alike = take_alike(pieces, selection, n);
  const int64_t unit = max_of(1, unit_of(selection, n));
  int32_t least = 1;
  for (int64_t begin = 0; begin < n; begin += unit) {
    const int64_t width = min_of(unit, n - begin);
    if (selection.k >= width) continue;
    const QuantizedCut cut = kernels.cut(q + begin, width, selection.k);
    if (cut.least == 0) continue;
    if (cut.excess > 0) drop_excess(kernels, topk, x + begin, width, cut, alike, q + begin);
    if (unit == n) {
      least = cut.least;  // left to the next pass over q
    } else {
      kernels.drop_below(q + begin, width, cut.least);
    }
  }
  return {gamma, least};
}

}  // namespace qsk
