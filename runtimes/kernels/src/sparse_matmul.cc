// The driver of products in floating point: select, list the active channels, then
// - rows one by one, skipping what is inactive in each; several rows pass over the weights together, in pieces that all
//   of them find in the cache;
// - or a GEMM, weights unpacked tile by tile, where `skips` says that it costs less.
//
// Floating-point sums depend on their order, so no order here depends on the number of threads: channels are cut into
// parts by the shape alone, each part is summed by one worker, and the parts are added in order.
#include "qsk/sparse_matmul.h"

#include <math.h>
#include <string.h>

#include "float_kernels.h"
#include "kernels.h"
#include "sparsified_row.h"
#include "work.h"

namespace qsk {
namespace {

constexpr int64_t kBatchRows = 8;              // rows whose sums stay in the cache together
constexpr int64_t kBatchBytes = 128 << 10;     // of weights that a batch takes at a time
constexpr int64_t kPartBytes = 64 << 10;       // of weights: below that a second thread costs more than it brings
constexpr int64_t kMostBatchParts = 4;         // each costs kBatchRows rows of sums
constexpr int64_t kSlack = 8;                  // elements that vector stores may write past a list's end
constexpr int64_t kSelectPiece = 16384;        // elements that one thread selects from faster than it can wake another
constexpr int64_t kFinishPiece = 8192;         // outputs that one thread adds up faster than it can wake another
constexpr int64_t kTileRows = 240;             // a multiple of 6: their sums and panels share the second-level cache
constexpr int64_t kLargestK = INT32_MAX - 64;  // channels are numbered by int32

struct Matrix {
  int64_t begin;    // its first column
  int64_t n;        // outputs without padding
  int64_t y_begin;  // its first output in a row of y
};

struct Active {
  int32_t* index;
  float* value;
  int64_t count;
};

WeightType weights_of(int weight_type) {
  switch (weight_type) {
    case QSK_FLOAT32:
      return kFloat32Weights;
    case QSK_FLOAT16:
      return kFloat16Weights;
    case QSK_INT8:
      return kInt8Weights;
    default:
      return kInt4Weights;
  }
}

int64_t bits_of(int weight_type) {
  const int64_t bits[kWeightTypes] = {32, 16, 8, 4};
  return bits[weights_of(weight_type)];
}

bool is_integer(int weight_type) { return weight_type == QSK_INT8 || weight_type == QSK_INT4; }

// Into how many parts the channels of so many bytes of weights are cut. Each costs a row of sums to clear and to add;
// even numbers, so that two threads finish together.
int64_t parts_of(int64_t bytes) {
  if (bytes >= 8 << 20) return 8;
  if (bytes >= 512 << 10) return 4;
  return bytes >= 2 * kPartBytes ? 2 : 1;
}

// The arguments and what follows from them alone.
struct Plan {
  explicit Plan(const qsk_sparse_matmul_args& given)
      : args(given),
        weights(weights_of(given.weight_type)),
        selection{given.top_k, given.block, given.rescale_l2 != 0} {
    for (int64_t i = 0; i < args.matrices; ++i) {
      matrices[i] = {columns, args.n[i], outputs};
      outputs += args.n[i];
      columns += qsk_sparse_matmul_columns(args.weight_type, args.n[i]);
    }
    row_bytes = columns * bits_of(args.weight_type) / 8;
    sums_stride = round_up(columns, kFloatTileOutputs);
    selects = args.top_k < (args.block > 0 ? args.block : args.k) || selection.rescale_l2;
    batch_rows = min_of(kBatchRows, args.m);
    parts = parts_of(args.k * row_bytes);
    if (args.m > 1) parts = min_of(parts, kMostBatchParts);
  }
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  const uint8_t* row(int64_t channel) const { return static_cast<const uint8_t*>(args.w) + channel * row_bytes; }
  const uint16_t* scales(int64_t channel) const {
    return is_integer(args.weight_type) ? args.scales + channel / args.group * columns : nullptr;
  }

  const qsk_sparse_matmul_args& args;
  const WeightType weights;
  const Selection selection;
  Matrix matrices[QSK_MOST_MATRICES];
  int64_t outputs = 0, columns = 0;  // without and with padding
  int64_t row_bytes, sums_stride, batch_rows, parts;
  bool selects;
};

// Everything that a call needs, cut from the caller's scratch.
struct Workspace {
  float* x;         // [m, k] masked, or converted from float16; null where x itself will do
  uint16_t* half;   // [workers, k] a rescaled row, rounded
  uint8_t* select;  // [workers, select_stride]
  int64_t select_stride;
  bool* is_bad;               // [m] rows that give NaN
  int64_t* active_count;      // [m]
  Active active[kBatchRows];  // of each row of a batch
  float* sums;                // [parts, batch rows, sums_stride]
  int32_t* partial;           // [parts, sums_stride] of a kernel
  float* panels;              // [workers, kFloatTileChannels * kFloatTileOutputs]
  float* tile_sums;           // [workers, kTileRows * kFloatTileOutputs]
  int64_t bytes;              // the scratch that all of this takes
};

struct Call {
  const qsk_variant& variant;
  const Plan& plan;
  const qsk_parallel* parallel;
  int64_t workers;
  Workspace work;

  const float* x(int64_t row) const {
    return (work.x != nullptr ? work.x : static_cast<const float*>(plan.args.x)) + row * plan.args.k;
  }
};

int64_t workers_for(const Plan& plan, const qsk_parallel* parallel) {
  const int64_t useful = plan.args.k * plan.row_bytes / kPartBytes * max_of(1, plan.args.m);
  return min_of(worker_count(parallel), max_of(1, useful));
}

Workspace lay_out(const Plan& plan, int64_t workers, void* base) {
  const qsk_sparse_matmul_args& args = plan.args;
  Scratch scratch(base);
  Workspace work = {};
  const bool half = args.type == QSK_FLOAT16;
  work.x = scratch.take<float>(half || plan.selects ? args.m * args.k : 0);
  if (!half && !plan.selects) work.x = nullptr;
  work.half = scratch.take<uint16_t>(half && plan.selection.rescale_l2 ? workers * args.k : 0);
  work.select_stride = plan.selects ? round_up(select_bytes(plan.selection, args.k), 64) : 0;
  work.select = scratch.take<uint8_t>(workers * work.select_stride);
  work.is_bad = scratch.take<bool>(args.m);
  work.active_count = scratch.take<int64_t>(args.m);
  for (int64_t row = 0; row < plan.batch_rows; ++row) {
    work.active[row].index = scratch.take<int32_t>(args.k + kSlack);
    work.active[row].value = scratch.take<float>(args.k + kSlack);
  }
  work.sums = scratch.take<float>(plan.parts * plan.batch_rows * plan.sums_stride);
  work.partial = scratch.take<int32_t>(is_integer(args.weight_type) ? plan.parts * plan.sums_stride : 0);
  const bool several = args.m > 1;
  work.panels = scratch.take<float>(several ? workers * kFloatTileChannels * kFloatTileOutputs : 0);
  work.tile_sums = scratch.take<float>(several ? workers * kTileRows * kFloatTileOutputs : 0);
  work.bytes = scratch.used();
  return work;
}

// Row `row` as float32, masked exactly as the op TopKSparsify would hand it on.
void prepare(const Call& call, int64_t row, int64_t worker) {
  const Plan& plan = call.plan;
  const qsk_sparse_matmul_args& args = plan.args;
  const bool half = args.type == QSK_FLOAT16;
  float* own = call.work.x == nullptr ? nullptr : call.work.x + row * args.k;
  const float* x = static_cast<const float*>(args.x) + row * args.k;
  if (half) {
    call.variant.half->to_float(static_cast<const uint16_t*>(args.x) + row * args.k, args.k, own);
    x = own;
  }
  if (plan.selects) {
    sparsify_row(*call.variant.topk, plan.selection, x, args.k, call.work.select + worker * call.work.select_stride,
                 own);
    if (half && plan.selection.rescale_l2) {  // what is only masked is a half already
      uint16_t* rounded = call.work.half + worker * args.k;
      call.variant.half->from_float(own, args.k, rounded);
      call.variant.half->to_float(rounded, args.k, own);
    }
    x = own;
  }
  call.work.is_bad[row] =
      is_integer(args.weight_type) && call.variant.quantize->largest_magnitude(x, args.k) >= kInfinityBits;
  if (args.m == 1) return;
  int64_t count = 0;
  for (int64_t c = 0; c < args.k; ++c) count += x[c] != 0.0f;
  call.work.active_count[row] = count;
}

// y[row, outputs of the columns begin..end-1] = `values`, one for each of these columns.
void hand_on(const Call& call, int64_t row, int64_t begin, int64_t end, const float* values) {
  const Plan& plan = call.plan;
  for (int64_t i = 0; i < plan.args.matrices; ++i) {
    const Matrix& matrix = plan.matrices[i];
    const int64_t from = max_of(begin, matrix.begin), to = min_of(end, matrix.begin + matrix.n);
    if (from >= to) continue;
    const int64_t position = row * plan.outputs + matrix.y_begin + from - matrix.begin;
    if (plan.args.type == QSK_FLOAT16) {
      call.variant.half->from_float(values + from - begin, to - from, static_cast<uint16_t*>(plan.args.y) + position);
    } else {
      memcpy(static_cast<float*>(plan.args.y) + position, values + from - begin, (to - from) * sizeof *values);
    }
  }
}

void fill_nan(float* values, int64_t n) {
  for (int64_t i = 0; i < n; ++i) values[i] = NAN;
}

// The position in `active` of the first channel that is not below `channel`.
int64_t position_of(const Active& active, int64_t channel) {
  int64_t low = 0, high = active.count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (active.index[middle] < channel) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// The end of what one call of a kernel takes from position `begin` on: channels of one group.
int64_t end_of_call(const Plan& plan, const Active& active, int64_t begin, int64_t end) {
  if (!is_integer(plan.args.weight_type) || begin >= end) return min_of(end, begin + kFloatRows);
  int64_t last = min_of(end, begin + min_of(kCodeRows, plan.args.group));
  const int64_t group_end = (active.index[begin] / plan.args.group + 1) * plan.args.group;
  while (active.index[last - 1] >= group_end) --last;
  return last;
}

void add_channels(const Call& call, const Active& active, int64_t begin, int64_t end, int32_t* partial, float* sums) {
  const Plan& plan = call.plan;
  FloatRows rows = {};
  rows.w = plan.row(0);
  rows.row_bytes = plan.row_bytes;
  rows.partial = partial;
  rows.outputs = plan.columns;
  while (begin < end) {
    const int64_t next = end_of_call(plan, active, begin, end);
    rows.scales = plan.scales(active.index[begin]);
    rows.index = active.index + begin;
    rows.value = active.value + begin;
    rows.count = next - begin;
    rows.next = active.index + next;
    rows.next_count = min_of(kFloatRows, active.count - next);
    rows.next_scales = next < end ? plan.scales(active.index[next]) : nullptr;
    call.variant.floats->add[plan.weights](rows, sums);
    begin = next;
  }
}

// Sums the channels of one part for the `rows` rows of a batch.
void add_part(const Call& call, const Active* batch, int64_t part, int64_t rows) {
  const Plan& plan = call.plan;
  const int64_t k = plan.args.k, stride = plan.sums_stride;
  float* sums = call.work.sums + part * plan.batch_rows * stride;
  memset(sums, 0, rows * stride * sizeof *sums);
  const int64_t end = k * (part + 1) / plan.parts;
  const int64_t piece = rows == 1 ? k : max_of(kFloatRows, kBatchBytes / plan.row_bytes);
  for (int64_t channel = k * part / plan.parts; channel < end; channel += piece) {
    const int64_t piece_end = min_of(end, channel + piece);
    for (int64_t row = 0; row < rows; ++row) {
      const Active& active = batch[row];
      add_channels(call, active, position_of(active, channel), position_of(active, piece_end),
                   call.work.partial + part * stride, sums + row * stride);
    }
  }
}

// y of row `first + row` of a batch: adds up the parts of the columns begin..end-1.
void finish(const Call& call, int64_t first, int64_t row, int64_t begin, int64_t end) {
  const Plan& plan = call.plan;
  float* sums = call.work.sums + row * plan.sums_stride + begin;
  const int64_t stride = plan.batch_rows * plan.sums_stride, n = end - begin;
  if (call.work.is_bad[first + row]) {
    fill_nan(sums, n);
  } else {
    for (int64_t part = 1; part < plan.parts; ++part) call.variant.layer->add(sums, sums + part * stride, n, sums);
  }
  hand_on(call, first + row, begin, end, sums);
}

void add_rows(const Call& call, int64_t first, int64_t rows) {
  const Plan& plan = call.plan;
  Active batch[kBatchRows];
  for (int64_t row = 0; row < rows; ++row) {
    Active& active = batch[row] = call.work.active[row];
    active.count = call.work.is_bad[first + row]
                       ? 0
                       : call.variant.floats->compact(call.x(first + row), plan.args.k, active.index, active.value);
  }
  Pieces parts(plan.parts);
  auto add = [&](int64_t) {
    for (int64_t part = parts.take(); part >= 0; part = parts.take()) add_part(call, batch, part, rows);
  };
  run_workers(call.parallel, min_of(call.workers, plan.parts), add);

  const int64_t pieces_per_row = ceil_div(plan.columns, kFinishPiece);
  Pieces pieces(rows * pieces_per_row);
  auto add_parts = [&](int64_t) {
    for (int64_t piece = pieces.take(); piece >= 0; piece = pieces.take()) {
      const int64_t begin = piece % pieces_per_row * kFinishPiece;
      finish(call, first, piece / pieces_per_row, begin, min_of(plan.columns, begin + kFinishPiece));
    }
  };
  run_workers(call.parallel, min_of(call.workers, max_of(1, rows * plan.columns / kFinishPiece)), add_parts);
}

// Whether each row on its own, skipping what is inactive in it, costs less than the GEMM over all channels.
bool skips(const Call& call) {
  const qsk_sparse_matmul_args& args = call.plan.args;
  int64_t active = 0;
  for (int64_t row = 0; row < args.m; ++row) active += call.work.active_count[row];
  const FloatGemmCost& cost = call.variant.floats->cost[call.plan.weights];
  const float unpacked = static_cast<float>(ceil_div(args.m, kTileRows)) * cost.unpack;
  return static_cast<float>(active) <=
         static_cast<float>(args.k) * (unpacked + cost.multiply * static_cast<float>(args.m));
}

void multiply_tile(const Call& call, int64_t first_row, int64_t begin, int64_t worker) {
  const Plan& plan = call.plan;
  const qsk_sparse_matmul_args& args = plan.args;
  const FloatKernels& kernels = *call.variant.floats;
  const int64_t rows = min_of(kTileRows, args.m - first_row);
  const int64_t end = min_of(plan.columns, begin + kFloatTileOutputs);
  float* panels = call.work.panels + worker * kFloatTileChannels * kFloatTileOutputs;
  float* sums = call.work.tile_sums + worker * kTileRows * kFloatTileOutputs;
  memset(sums, 0, rows * kFloatTileOutputs * sizeof *sums);
  for (int64_t channel = 0; channel < args.k; channel += kFloatTileChannels) {
    FloatTile tile = {};
    tile.w = plan.row(channel) + begin * bits_of(args.weight_type) / 8;
    tile.row_bytes = plan.row_bytes;
    tile.channels = min_of(kFloatTileChannels, args.k - channel);
    tile.outputs = end - begin;
    if (is_integer(args.weight_type)) {
      tile.scales = plan.scales(channel) + begin;
      tile.scales_stride = plan.columns;
      tile.group = args.group;
      tile.group_left = args.group - channel % args.group;
    }
    kernels.unpack[plan.weights](tile, panels);
    kernels.multiply(panels, tile.channels, call.x(first_row) + channel, args.k, rows, sums);
  }
  for (int64_t row = 0; row < rows; ++row) {
    float* values = sums + row * kFloatTileOutputs;
    if (call.work.is_bad[first_row + row]) fill_nan(values, end - begin);
    hand_on(call, first_row + row, begin, end, values);
  }
}

void multiply_rows(const Call& call) {
  const Plan& plan = call.plan;
  const int64_t row_tiles = ceil_div(plan.args.m, kTileRows);
  const int64_t column_tiles = ceil_div(plan.columns, kFloatTileOutputs);
  Pieces tiles(row_tiles * column_tiles);
  auto body = [&](int64_t worker) {
    for (int64_t tile = tiles.take(); tile >= 0; tile = tiles.take()) {
      multiply_tile(call, tile % row_tiles * kTileRows, tile / row_tiles * kFloatTileOutputs, worker);
    }
  };
  run_workers(call.parallel, min_of(call.workers, row_tiles * column_tiles), body);
}

int check(const qsk_sparse_matmul_args* args) {
  if (args == nullptr) return QSK_NULL_ARGUMENT;
  if (args->type != QSK_FLOAT32 && args->type != QSK_FLOAT16) return QSK_BAD_TYPE;
  if (args->weight_type < QSK_FLOAT32 || args->weight_type > QSK_INT4) return QSK_BAD_TYPE;
  if (args->m < 0 || args->k < 0 || args->k > kLargestK || args->m > INT32_MAX) return QSK_BAD_SIZE;
  if (args->block < 0 || args->matrices < 0 || args->matrices > QSK_MOST_MATRICES) return QSK_BAD_SIZE;
  if (is_integer(args->weight_type) && args->group < 1) return QSK_BAD_SIZE;
  if (args->matrices > 0 && args->n == nullptr) return QSK_NULL_ARGUMENT;
  int64_t outputs = 0;
  for (int64_t i = 0; i < args->matrices; ++i) {
    if (args->n[i] < 0 || args->n[i] > INT32_MAX) return QSK_BAD_SIZE;
    outputs += qsk_sparse_matmul_columns(args->weight_type, args->n[i]);
  }
  if (outputs > INT32_MAX) return QSK_BAD_SIZE;
  if (args->top_k < 0 || args->top_k > (args->block > 0 ? args->block : args->k)) return QSK_BAD_K;
  return QSK_OK;
}

int multiply(const qsk_variant& variant, const Plan& plan, const qsk_parallel* parallel, void* scratch,
             int64_t scratch_bytes) {
  const qsk_sparse_matmul_args& args = plan.args;
  if (args.m == 0 || plan.outputs == 0) return QSK_OK;
  if (args.y == nullptr || scratch == nullptr) return QSK_NULL_ARGUMENT;
  if (args.k > 0 && (args.x == nullptr || args.w == nullptr)) return QSK_NULL_ARGUMENT;
  if (args.k > 0 && is_integer(args.weight_type) && args.scales == nullptr) return QSK_NULL_ARGUMENT;
  const int64_t workers = workers_for(plan, parallel);
  const Workspace work = lay_out(plan, workers, scratch);
  if (scratch_bytes < work.bytes) return QSK_SCRATCH_TOO_SMALL;
  const Call call = {variant, plan, parallel, workers, work};

  Pieces rows(args.m);
  auto prepare_rows = [&](int64_t worker) {
    for (int64_t row = rows.take(); row >= 0; row = rows.take()) prepare(call, row, worker);
  };
  run_workers(parallel, args.m * args.k < kSelectPiece ? 1 : min_of(workers, args.m), prepare_rows);
  if (args.m > 1 && !skips(call)) {
    multiply_rows(call);
    return QSK_OK;
  }
  for (int64_t first = 0; first < args.m; first += plan.batch_rows) {
    add_rows(call, first, min_of(plan.batch_rows, args.m - first));
  }
  return QSK_OK;
}

}  // namespace
}  // namespace qsk

int64_t qsk_sparse_matmul_columns(int weight_type, int64_t n) {
  return qsk::is_integer(weight_type) ? qsk::round_up(n, QSK_NBITS_TILE_OUTPUTS) : n;
}

int64_t qsk_sparse_matmul_scratch_bytes(const qsk_sparse_matmul_args* args, const qsk_parallel* parallel) {
  if (qsk::check(args) != QSK_OK) return 0;
  const qsk::Plan plan(*args);
  return qsk::lay_out(plan, qsk::workers_for(plan, parallel), nullptr).bytes;
}

int qsk_sparse_matmul(const qsk_variant* variant, const qsk_sparse_matmul_args* args, const qsk_parallel* parallel,
                      void* scratch, int64_t scratch_bytes) {
  int status = qsk::check(args);
  if (status == QSK_OK) status = qsk::resolve_variant(&variant);
  if (status != QSK_OK) return status;
  const qsk::Plan plan(*args);
  return qsk::multiply(*variant, plan, parallel, scratch, scratch_bytes);
}
