#include "qsk/quantize_rows.h"

#include <math.h>
#include <string.h>

#include "kernels.h"
#include "quantized_row.h"

float qsk::quantize_row(const QuantizeKernels& kernels, const float* x, int64_t n, int8_t* q, int32_t* sum) {
  constexpr float kGammaFloor = 1e-5f;
  const uint32_t magnitude = kernels.largest_magnitude(x, n);
  if (magnitude >= kInfinityBits) {
    memset(q, 0, n);
    *sum = 0;
    return NAN;
  }
  float gamma;
  memcpy(&gamma, &magnitude, sizeof gamma);
  if (gamma < kGammaFloor) gamma = kGammaFloor;
  *sum = kernels.quantize(x, n, 127.0f / gamma, q);
  return gamma;
}

int qsk_quantize_rows(const qsk_variant* variant, const float* x, int64_t rows, int64_t width, int8_t* q,
                      float* gamma) {
  const int status = qsk::resolve_variant(&variant);
  if (status != QSK_OK) return status;
  if (rows < 0 || width < 0 || (width > 0 && rows > INT64_MAX / 8 / width)) return QSK_BAD_SIZE;
  if (rows > 0 && (gamma == nullptr || (width > 0 && (x == nullptr || q == nullptr)))) return QSK_NULL_ARGUMENT;
  for (int64_t row = 0; row < rows; ++row) {
    int32_t sum;
    gamma[row] = qsk::quantize_row(*variant->quantize, x + row * width, width, q + row * width, &sum);
  }
  return QSK_OK;
}
