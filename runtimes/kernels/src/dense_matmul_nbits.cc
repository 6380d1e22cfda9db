// The driver of DenseMatMulNBits: rows of x are laid out as the kernel multiplies them, then the workers take runs of
// outputs. And GatherNBits, which has no other kernel.
#include "qsk/dense_matmul_nbits.h"

#include <math.h>
#include <string.h>

#include "float_kernels.h"
#include "kernels.h"
#include "work.h"

namespace qsk {
namespace {

constexpr int64_t kLanes = 8;  // of which each has inputs of one group

// Weights that a worker takes at a time. It prefetches beyond their end, which is another worker's work: so they are
// many, but enough pieces for all to finish together.
constexpr int64_t kLeastPieceBytes = 64 << 10;
constexpr int64_t kPiecesPerWorker = 64;

struct Plan {
  explicit Plan(const qsk_dense_matmul_nbits_args& given, const qsk_parallel* parallel) : args(given) {
    weights = args.bits == 4 ? kInt4Weights : kInt8Weights;
    row_bytes = qsk_dense_row_bytes(args.k, args.bits);
    steps = ceil_div(row_bytes, 32);
    const int64_t blocks = ceil_div(steps, kDenseBlockSteps);
    x_bytes = blocks * static_cast<int64_t>(args.bits == 4 ? sizeof(DenseBlock<4>) : sizeof(DenseBlock<8>));
    const int64_t least_outputs = max_of(1, kLeastPieceBytes / max_of(1, row_bytes));
    piece_outputs = max_of(least_outputs, ceil_div(args.n, kPiecesPerWorker * worker_count(parallel)));
    pieces = ceil_div(args.n, piece_outputs);
    workers = min_of(worker_count(parallel), max_of(1, pieces));
  }
  const qsk_dense_matmul_nbits_args& args;
  WeightType weights;
  int64_t row_bytes, steps, x_bytes, piece_outputs, pieces, workers;
};

struct Workspace {
  float* converted;  // [k] a row of float16
  uint8_t* x;        // [m, x_bytes]
  bool* is_bad;      // [m]
  float* y;          // [workers, m, piece_outputs]
  float* scales;     // [workers, scales_stride] those of some outputs in float
  int64_t scales_stride;
  int64_t bytes;
};

Workspace lay_out(const Plan& plan, void* base) {
  Scratch scratch(base);
  Workspace work = {};
  work.converted = scratch.take<float>(plan.args.type == QSK_FLOAT16 ? plan.args.k : 0);
  work.x = scratch.take<uint8_t>(plan.args.m * plan.x_bytes);
  work.is_bad = scratch.take<bool>(plan.args.m);
  work.y = scratch.take<float>(plan.workers * plan.args.m * plan.piece_outputs);
  work.scales_stride = round_up(kDensePiece * ceil_div(plan.args.k, plan.args.group), kLanes) + kLanes;
  work.scales = scratch.take<float>(plan.workers * work.scales_stride);
  work.bytes = scratch.used();
  return work;
}

void prepare(const qsk_variant& variant, const Plan& plan, const Workspace& work, int64_t row) {
  const qsk_dense_matmul_nbits_args& args = plan.args;
  const float* x = static_cast<const float*>(args.x) + row * args.k;
  if (args.type == QSK_FLOAT16) {
    variant.half->to_float(static_cast<const uint16_t*>(args.x) + row * args.k, args.k, work.converted);
    x = work.converted;
  }
  work.is_bad[row] = variant.quantize->largest_magnitude(x, args.k) >= kInfinityBits;
  uint8_t* out = work.x + row * plan.x_bytes;
  if (work.is_bad[row]) {
    memset(out, 0, plan.x_bytes);
  } else {
    variant.floats->lay_out_x[plan.weights](x, args.k, plan.steps, out);
  }
}

void multiply_piece(const qsk_variant& variant, const Plan& plan, const Workspace& work, int64_t piece,
                    int64_t worker) {
  const qsk_dense_matmul_nbits_args& args = plan.args;
  const int64_t begin = piece * plan.piece_outputs, outputs = min_of(plan.piece_outputs, args.n - begin);
  const int64_t groups = ceil_div(args.k, args.group);
  float* const y = work.y + worker * args.m * plan.piece_outputs;
  DenseRows rows = {};
  rows.w = args.w + begin * plan.row_bytes;
  rows.row_bytes = plan.row_bytes;
  rows.scales = args.scales + begin * groups;
  rows.scales_stride = groups;
  rows.group = args.group;
  rows.wide = work.scales + worker * work.scales_stride;
  rows.outputs = outputs;
  rows.steps = plan.steps;
  rows.x = work.x;
  rows.rows = args.m;
  rows.y_stride = outputs;
  variant.floats->dense[plan.weights](rows, y);
  for (int64_t row = 0; row < args.m; ++row) {
    float* values = y + row * outputs;
    if (work.is_bad[row]) {
      for (int64_t i = 0; i < outputs; ++i) values[i] = NAN;
    }
    const int64_t position = row * args.n + begin;
    if (args.type == QSK_FLOAT16) {
      variant.half->from_float(values, outputs, static_cast<uint16_t*>(args.y) + position);
    } else {
      memcpy(static_cast<float*>(args.y) + position, values, outputs * sizeof *values);
    }
  }
}

int check(const qsk_dense_matmul_nbits_args* args) {
  if (args == nullptr) return QSK_NULL_ARGUMENT;
  if (args->type != QSK_FLOAT32 && args->type != QSK_FLOAT16) return QSK_BAD_TYPE;
  if (args->bits != 4 && args->bits != 8) return QSK_BAD_TYPE;
  if (args->m < 0 || args->k < 0 || args->n < 0 || args->group < 1) return QSK_BAD_SIZE;
  if (args->group % kLanes != 0 && args->group < args->k) return QSK_BAD_SIZE;
  if (args->m > INT32_MAX || args->k > INT32_MAX - 64 || args->n > INT32_MAX) return QSK_BAD_SIZE;
  return QSK_OK;
}

int check(const qsk_gather_nbits_args* args) {
  if (args == nullptr) return QSK_NULL_ARGUMENT;
  if (args->bits != 4 && args->bits != 8) return QSK_BAD_TYPE;
  if (args->count < 0 || args->k < 0 || args->n < 0 || args->group < 1) return QSK_BAD_SIZE;
  if (args->count > INT32_MAX || args->k > INT32_MAX - 64 || args->n > INT32_MAX) return QSK_BAD_SIZE;
  return QSK_OK;
}

void gather_row(const qsk_variant& variant, const qsk_gather_nbits_args& args, int64_t position) {
  const int64_t id = args.ids[position], groups = ceil_div(args.k, args.group);
  const uint8_t* row = args.w + id * qsk_dense_row_bytes(args.k, args.bits);
  float* y = args.y + position * args.k;
  const int zero_point = 1 << (args.bits - 1);
  for (int64_t group = 0; group < groups; ++group) {
    float scale;
    variant.half->to_float(args.scales + id * groups + group, 1, &scale);
    const int64_t end = min_of(args.k, (group + 1) * args.group);
    for (int64_t c = group * args.group; c < end; ++c) {
      const int code = args.bits == 8 ? row[c] : row[c / 2] >> (c % 2 * 4) & 15;
      y[c] = static_cast<float>(code - zero_point) * scale;
    }
  }
}

}  // namespace
}  // namespace qsk

int64_t qsk_dense_row_bytes(int64_t k, int64_t bits) { return qsk::ceil_div(k * bits, 8); }

int64_t qsk_dense_matmul_nbits_scratch_bytes(const qsk_dense_matmul_nbits_args* args, const qsk_parallel* parallel) {
  if (qsk::check(args) != QSK_OK) return 0;
  return qsk::lay_out(qsk::Plan(*args, parallel), nullptr).bytes;
}

int qsk_dense_matmul_nbits(const qsk_variant* variant, const qsk_dense_matmul_nbits_args* args,
                           const qsk_parallel* parallel, void* scratch, int64_t scratch_bytes) {
  int status = qsk::check(args);
  if (status == QSK_OK) status = qsk::resolve_variant(&variant);
  if (status != QSK_OK) return status;
  if (args->m == 0 || args->n == 0) return QSK_OK;
  if (args->y == nullptr || scratch == nullptr) return QSK_NULL_ARGUMENT;
  if (args->k > 0 && (args->x == nullptr || args->w == nullptr || args->scales == nullptr)) return QSK_NULL_ARGUMENT;
  const qsk::Plan plan(*args, parallel);
  const qsk::Workspace work = qsk::lay_out(plan, scratch);
  if (scratch_bytes < work.bytes) return QSK_SCRATCH_TOO_SMALL;
  for (int64_t row = 0; row < args->m; ++row) qsk::prepare(*variant, plan, work, row);
  qsk::Pieces pieces(plan.pieces);
  auto body = [&](int64_t worker) {
    for (int64_t piece = pieces.take(); piece >= 0; piece = pieces.take()) {
      qsk::multiply_piece(*variant, plan, work, piece, worker);
    }
  };
  qsk::run_workers(parallel, plan.workers, body);
  return QSK_OK;
}

int64_t qsk_gather_nbits_scratch_bytes(const qsk_gather_nbits_args*, const qsk_parallel*) { return 0; }

int qsk_gather_nbits(const qsk_variant* variant, const qsk_gather_nbits_args* args, const qsk_parallel*, void*,
                     int64_t) {
  int status = qsk::check(args);
  if (status == QSK_OK) status = qsk::resolve_variant(&variant);
  if (status != QSK_OK) return status;
  if (args->count == 0 || args->k == 0) return QSK_OK;
  if (args->ids == nullptr || args->w == nullptr || args->scales == nullptr || args->y == nullptr) {
    return QSK_NULL_ARGUMENT;
  }
  for (int64_t i = 0; i < args->count; ++i) {
    if (args->ids[i] < 0 || args->ids[i] >= args->n) return QSK_BAD_INDEX;
    qsk::gather_row(*variant, *args, i);
  }
  return QSK_OK;
}
