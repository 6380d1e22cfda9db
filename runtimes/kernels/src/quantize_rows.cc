#include "qsk/quantize_rows.h"

#include "kernels.h"
#include "quantized_row.h"
#include "work.h"

namespace qsk {
namespace {

constexpr int64_t kElementsPerWorker = 32768;  // below that a second thread costs more than it brings

}  // namespace
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
      args->gamma[row] = qsk::quantize_row(*variant->quantize, args->x + row * width, width, args->q + row * width);
    }
  };
  const int64_t useful = qsk::max_of(1, args->rows * width / qsk::kElementsPerWorker);
  qsk::run_workers(parallel, qsk::min_of(qsk::worker_count(parallel), qsk::min_of(useful, args->rows)), body);
  return QSK_OK;
}
