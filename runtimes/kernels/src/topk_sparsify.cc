#include "qsk/topk_sparsify.h"

#include <math.h>
#include <string.h>

#include "kernels.h"
#include "sparsified_row.h"
#include "work.h"

namespace qsk {
namespace {

constexpr int64_t kElementsPerWorker = 16384;  // below that a second thread costs more than it brings
constexpr float kNormFloor = 1e-12f;

struct WorkerScratch {
  float* row;
  void* select;
};

int64_t workers_for(const qsk_topk_sparsify_args& args, const qsk_parallel* parallel) {
  const int64_t useful = max_of(1, args.rows * args.width / kElementsPerWorker);
  return min_of(min_of(worker_count(parallel), useful), max_of(1, args.rows));
}

int64_t unit_of(int64_t block, int64_t width) { return block > 0 ? min_of(block, width) : width; }

Selection selection_of(const qsk_topk_sparsify_args& args) { return {args.k, args.block, args.rescale_l2 != 0}; }

WorkerScratch take_worker(Scratch& scratch, const qsk_topk_sparsify_args& args) {
  return {scratch.take<float>(args.width), scratch.take<uint8_t>(select_bytes(selection_of(args), args.width))};
}

int check(const qsk_topk_sparsify_args* args) {
  if (args == nullptr) return QSK_NULL_ARGUMENT;
  if (args->type != QSK_FLOAT32 && args->type != QSK_FLOAT16) return QSK_BAD_TYPE;
  if (args->rows < 0 || args->width < 0 || args->block < 0) return QSK_BAD_SIZE;
  if (args->width > INT32_MAX || (args->width > 0 && args->rows > INT64_MAX / 8 / args->width)) return QSK_BAD_SIZE;
  if (args->k < 0 || args->k > (args->block > 0 ? args->block : args->width)) return QSK_BAD_K;
  return QSK_OK;
}

void sparsify_unit(const TopKKernels& kernels, const float* x, int64_t n, int64_t k, void* scratch, float* y) {
  if (k >= n) {
    if (x != y) memcpy(y, x, n * sizeof *y);
  } else if (k == 0) {
    kernels.keep(x, n, {kInfinityBits, 0}, y);  // no key is above infinity: only NaN stays
  } else {
    kernels.keep(x, n, kernels.select(x, n, k, scratch), y);
  }
}

void rescale_row(float* y, int64_t n) {
  constexpr int64_t kLanes = 16;  // independent sums: vectors without reassociation, and a smaller rounding error
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i % kLanes] += y[i] * y[i];
  float square_sum = 0.0f;
  for (float lane : lanes) square_sum += lane;
  const float norm = sqrtf(square_sum);
  const float divisor = norm < kNormFloor ? kNormFloor : norm;  // a NaN norm stays NaN
  for (int64_t i = 0; i < n; ++i) y[i] /= divisor;
}

void sparsify(const qsk_variant& variant, const qsk_topk_sparsify_args& args, int64_t row, WorkerScratch scratch) {
  const bool half = args.type == QSK_FLOAT16;
  const int64_t offset = row * args.width;
  const float* x = static_cast<const float*>(args.x) + (half ? 0 : offset);
  float* y = static_cast<float*>(args.y) + (half ? 0 : offset);
  if (half) {
    variant.half->to_float(static_cast<const uint16_t*>(args.x) + offset, args.width, scratch.row);
    x = y = scratch.row;
  }
  sparsify_row(*variant.topk, selection_of(args), x, args.width, scratch.select, y);
  if (half) variant.half->from_float(y, args.width, static_cast<uint16_t*>(args.y) + offset);
}

}  // namespace

int64_t select_bytes(const Selection& selection, int64_t width) {
  return kSelectBytes * unit_of(selection.block, width) + kSelectSlack;
}

void sparsify_row(const TopKKernels& kernels, const Selection& selection, const float* x, int64_t width, void* scratch,
                  float* y) {
  const int64_t unit = max_of(1, unit_of(selection.block, width));
  for (int64_t begin = 0; begin < width; begin += unit) {
    const int64_t n = min_of(unit, width - begin);
    sparsify_unit(kernels, x + begin, n, min_of(selection.k, n), scratch, y + begin);
  }
  if (selection.rescale_l2) rescale_row(y, width);
}

}  // namespace qsk

int64_t qsk_topk_sparsify_scratch_bytes(const qsk_topk_sparsify_args* args, const qsk_parallel* parallel) {
  if (qsk::check(args) != QSK_OK) return 0;
  qsk::Scratch scratch(nullptr);
  for (int64_t i = 0; i < qsk::workers_for(*args, parallel); ++i) qsk::take_worker(scratch, *args);
  return scratch.used();
}

int qsk_topk_sparsify(const qsk_variant* variant, const qsk_topk_sparsify_args* args, const qsk_parallel* parallel,
                      void* scratch, int64_t scratch_bytes) {
  int status = qsk::check(args);
  if (status == QSK_OK) status = qsk::resolve_variant(&variant);
  if (status != QSK_OK) return status;
  if (args->rows == 0 || args->width == 0) return QSK_OK;
  if (args->x == nullptr || args->y == nullptr || scratch == nullptr) return QSK_NULL_ARGUMENT;
  if (scratch_bytes < qsk_topk_sparsify_scratch_bytes(args, parallel)) return QSK_SCRATCH_TOO_SMALL;
  const int64_t workers = qsk::workers_for(*args, parallel);
  const int64_t per_worker = qsk_topk_sparsify_scratch_bytes(args, nullptr);
  qsk::Pieces rows(args->rows);
  auto body = [&](int64_t worker) {
    qsk::Scratch own(static_cast<uint8_t*>(scratch) + worker * per_worker);
    const qsk::WorkerScratch pieces = qsk::take_worker(own, *args);
    for (int64_t row = rows.take(); row >= 0; row = rows.take()) qsk::sparsify(*variant, *args, row, pieces);
  };
  qsk::run_workers(parallel, workers, body);
  return QSK_OK;
}
