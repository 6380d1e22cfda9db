#include "qsk/gated_activation.h"

#include "kernels.h"
#include "work.h"

namespace qsk {
namespace {

constexpr int64_t kElementsPerWorker = 16384;  // below that a second thread costs more than it brings

int check(const qsk_gated_activation_args* args) {
  if (args == nullptr) return QSK_NULL_ARGUMENT;
  if (args->type != QSK_FLOAT32 && args->type != QSK_FLOAT16) return QSK_BAD_TYPE;
  if (args->activation != QSK_RELU2 && args->activation != QSK_SILU) return QSK_BAD_TYPE;
  if (args->rows < 0 || args->n < 0 || args->n > INT32_MAX) return QSK_BAD_SIZE;
  if (args->n > 0 && args->rows > INT64_MAX / 16 / args->n) return QSK_BAD_SIZE;
  return QSK_OK;
}

int64_t workers_for(const qsk_gated_activation_args& args, const qsk_parallel* parallel) {
  const int64_t useful = max_of(1, args.rows * args.n / kElementsPerWorker);
  return min_of(min_of(worker_count(parallel), useful), max_of(1, args.rows));
}

int64_t worker_bytes(const qsk_gated_activation_args& args) {
  Scratch count(nullptr);
  count.take<float>(args.type == QSK_FLOAT16 ? 2 * args.n : 0);
  return count.used();
}

}  // namespace
}  // namespace qsk

int64_t qsk_gated_activation_scratch_bytes(const qsk_gated_activation_args* args, const qsk_parallel* parallel) {
  if (qsk::check(args) != QSK_OK) return 0;
  return qsk::workers_for(*args, parallel) * qsk::worker_bytes(*args);
}

int qsk_gated_activation(const qsk_variant* variant, const qsk_gated_activation_args* args,
                         const qsk_parallel* parallel, void* scratch, int64_t scratch_bytes) {
  int status = qsk::check(args);
  if (status == QSK_OK) status = qsk::resolve_variant(&variant);
  if (status != QSK_OK) return status;
  if (args->rows == 0 || args->n == 0) return QSK_OK;
  const int64_t needed = qsk_gated_activation_scratch_bytes(args, parallel);
  if (args->x == nullptr || args->y == nullptr || (needed > 0 && scratch == nullptr)) return QSK_NULL_ARGUMENT;
  if (scratch_bytes < needed) return QSK_SCRATCH_TOO_SMALL;
  const auto activate = args->activation == QSK_RELU2 ? variant->layer->gated_relu2 : variant->layer->gated_silu;
  qsk::Pieces rows(args->rows);
  auto body = [&](int64_t worker) {
    float* converted = reinterpret_cast<float*>(static_cast<uint8_t*>(scratch) + worker * qsk::worker_bytes(*args));
    for (int64_t row = rows.take(); row >= 0; row = rows.take()) {
      const float* x = static_cast<const float*>(args->x) + 2 * row * args->n;
      if (args->type == QSK_FLOAT16) {
        variant->half->to_float(static_cast<const uint16_t*>(args->x) + 2 * row * args->n, 2 * args->n, converted);
        x = converted;
      }
      activate(x, x + args->n, args->n, args->y + row * args->n);
    }
  };
  qsk::run_workers(parallel, qsk::workers_for(*args, parallel), body);
  return QSK_OK;
}
