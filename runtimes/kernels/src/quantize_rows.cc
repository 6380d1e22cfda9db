#include "qsk/quantize_rows.h"

#include <math.h>
#include <string.h>

#include "kernels.h"
#include "quantized_row.h"
#include "work.h"

namespace qsk {

constexpr int64_t kElementsPerWorker = 32768;  // below that a second thread costs more than it brings

float quantize_row(const QuantizeKernels& kernels, const float* x, int64_t n, int8_t* q, int32_t* sum) {
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

}  // namespace qsk

int64_t qsk_quantize_rows_scratch_bytes(const qsk_quantize_rows_args*, const qsk_parallel*) { return 0; }

int qsk_quantize_rows(const qsk_variant* variant, const qsk_quantize_rows_args* args, const qsk_parallel* parallel,
                      void*, int64_t) {
  if (args == nullptr) return QSK_NULL_ARGUMENT;
  const int status = qsk::resolve_variant(&variant);
  if (status != QSK_OK) return status;
  const int64_t width = args->width;
  if (args->rows < 0 || width < 0 || (width > 0 && args->rows > INT64_MAX / 8 / width)) return QSK_BAD_SIZE;
  if (args->rows == 0) return QSK_OK;
  if (args->gamma == nullptr) return QSK_NULL_ARGUMENT;
  if (width > 0 && (args->x == nullptr || args->q == nullptr)) return QSK_NULL_ARGUMENT;
  qsk::Pieces rows(args->rows);
  auto body = [&](int64_t) {
    for (int64_t row = rows.take(); row >= 0; row = rows.take()) {
      int32_t sum;
      args->gamma[row] =
          qsk::quantize_row(*variant->quantize, args->x + row * width, width, args->q + row * width, &sum);
    }
  };
  const int64_t useful = qsk::max_of(1, args->rows * width / qsk::kElementsPerWorker);
  qsk::run_workers(parallel, qsk::min_of(qsk::worker_count(parallel), qsk::min_of(useful, args->rows)), body);
  return QSK_OK;
}
