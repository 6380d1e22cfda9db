#include "qsk/add_rms_norm.h"

#include <math.h>

#include "kernels.h"
#include "work.h"

namespace qsk {
namespace {

constexpr int64_t kElementsPerWorker = 16384;  // below that a second thread costs more than it brings

int check(const qsk_add_rms_norm_args* args) {
  if (args == nullptr) return QSK_NULL_ARGUMENT;
  if (args->type != QSK_FLOAT32 && args->type != QSK_FLOAT16) return QSK_BAD_TYPE;
  if (args->rows < 0 || args->n < 0 || args->n > INT32_MAX) return QSK_BAD_SIZE;
  if (args->n > 0 && args->rows > INT64_MAX / 16 / args->n) return QSK_BAD_SIZE;
  return QSK_OK;
}

int64_t workers_for(const qsk_add_rms_norm_args& args, const qsk_parallel* parallel) {
  const int64_t useful = max_of(1, args.rows * args.n / kElementsPerWorker);
  return min_of(min_of(worker_count(parallel), useful), max_of(1, args.rows));
}

struct Rows {
  float* sum;
  float* other;  // the residual, then the weight
};

Rows take_rows(Scratch& scratch, const qsk_add_rms_norm_args& args) {
  const int64_t n = args.type == QSK_FLOAT16 ? args.n : 0;
  float* sum = scratch.take<float>(n);
  return {sum, scratch.take<float>(n)};
}

int64_t worker_bytes(const qsk_add_rms_norm_args& args) {
  Scratch count(nullptr);
  take_rows(count, args);
  return count.used();
}

float factor_of(const LayerKernels& kernels, const qsk_add_rms_norm_args& args, const float* sum) {
  const float mean = kernels.square_sum(sum, args.n) / static_cast<float>(args.n);
  return 1.0f / sqrtf(mean + args.epsilon);
}

void normalise(const qsk_variant& variant, const qsk_add_rms_norm_args& args, int64_t row) {
  const int64_t offset = row * args.n;
  const float* x = static_cast<const float*>(args.x) + offset;
  const float* residual = static_cast<const float*>(args.residual) + offset;
  float* sum = static_cast<float*>(args.sum) + offset;
  float* y = static_cast<float*>(args.y) + offset;
  variant.layer->add(x, residual, args.n, sum);
  variant.layer->scale(sum, static_cast<const float*>(args.weight), args.n, factor_of(*variant.layer, args, sum), y);
}

void normalise_half(const qsk_variant& variant, const qsk_add_rms_norm_args& args, int64_t row, const Rows& own) {
  const int64_t offset = row * args.n;
  uint16_t* sum = static_cast<uint16_t*>(args.sum) + offset;
  variant.half->to_float(static_cast<const uint16_t*>(args.x) + offset, args.n, own.sum);
  variant.half->to_float(static_cast<const uint16_t*>(args.residual) + offset, args.n, own.other);
  variant.layer->add(own.sum, own.other, args.n, own.sum);
  variant.half->from_float(own.sum, args.n, sum);
  variant.half->to_float(sum, args.n, own.sum);  // the norm sees what the next layer sees
  variant.half->to_float(static_cast<const uint16_t*>(args.weight), args.n, own.other);
  variant.layer->scale(own.sum, own.other, args.n, factor_of(*variant.layer, args, own.sum), own.sum);
  variant.half->from_float(own.sum, args.n, static_cast<uint16_t*>(args.y) + offset);
}

}  // namespace
}  // namespace qsk

int64_t qsk_add_rms_norm_scratch_bytes(const qsk_add_rms_norm_args* args, const qsk_parallel* parallel) {
  if (qsk::check(args) != QSK_OK) return 0;
  return qsk::workers_for(*args, parallel) * qsk::worker_bytes(*args);
}

int qsk_add_rms_norm(const qsk_variant* variant, const qsk_add_rms_norm_args* args, const qsk_parallel* parallel,
                     void* scratch, int64_t scratch_bytes) {
  int status = qsk::check(args);
  if (status == QSK_OK) status = qsk::resolve_variant(&variant);
  if (status != QSK_OK) return status;
  if (args->rows == 0 || args->n == 0) return QSK_OK;
  const int64_t needed = qsk_add_rms_norm_scratch_bytes(args, parallel);
  const void* pointers[] = {args->x, args->residual, args->weight, args->sum, args->y};
  for (const void* pointer : pointers) {
    if (pointer == nullptr) return QSK_NULL_ARGUMENT;
  }
  if (needed > 0 && scratch == nullptr) return QSK_NULL_ARGUMENT;
  if (scratch_bytes < needed) return QSK_SCRATCH_TOO_SMALL;
  qsk::Pieces rows(args->rows);
  auto body = [&](int64_t worker) {
    qsk::Scratch piece(static_cast<uint8_t*>(scratch) + worker * qsk::worker_bytes(*args));
    const qsk::Rows own = qsk::take_rows(piece, *args);
    for (int64_t row = rows.take(); row >= 0; row = rows.take()) {
      if (args->type == QSK_FLOAT16) {
        qsk::normalise_half(*variant, *args, row, own);
      } else {
        qsk::normalise(*variant, *args, row);
      }
    }
  };
  qsk::run_workers(parallel, qsk::workers_for(*args, parallel), body);
  return QSK_OK;
}
