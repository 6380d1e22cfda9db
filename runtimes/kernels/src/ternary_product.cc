// The driver of ternary products: select, quantise, list the active channels, then
// - one row: one pass over its active channels, which the workers share among themselves;
// - several rows, by the rule in `skips`: either batches of rows that pass over the weights together, each row adding
// up
//   its own active channels while their weights are in the cache,
// - or tiles of an integer GEMM over the channels that are active in any row: weights unpacked, or products looked up
// in
//   tables, whichever costs less.
#include "ternary_product.h"

#include <math.h>
#include <string.h>

#include "kernels.h"
#include "qsk/ternary_matmul.h"
#include "quantized_row.h"
#include "work.h"

namespace qsk {
namespace {

constexpr int64_t kBatchRows = 8;              // rows whose sums stay in the cache together
constexpr int64_t kBatchBytes = 128 << 10;     // of weights that a batch takes at a time
constexpr int64_t kBytesPerWorker = 32 << 10;  // of weights: below that a second thread costs more than it brings
constexpr int64_t kPieceBytes = 32 << 10;      // of weights that a worker takes at a time, at least
constexpr int64_t kLineBytes = 64;             // of the cache
constexpr int64_t kSlack = 64;                 // elements that vector stores may write past a list's end
constexpr int64_t kQuantizePiece = 32768;      // elements that one thread quantises faster than it can wake another
constexpr int64_t kFinishPiece = 8192;         // sums that one thread adds up faster than it can wake another

// The active channels of a row, or of any row.
struct Active {
  int32_t* index;
  int8_t* value;
  int64_t count;
};

// Everything that a call needs, cut from the caller's scratch. Per-worker arrays have a fixed stride.
struct Workspace {
  float* x;         // [workers, k] rows converted from float16 or rescaled
  uint16_t* half;   // [workers, k] a rescaled row, rounded
  uint8_t* select;  // [workers, select_stride]
  int64_t select_stride;
  int8_t* q;  // [m, q_stride]
  int64_t q_stride;
  float* gamma;              // [m]
  Tally* tally;              // [m]
  Active active;             // one row's, or the union's
  Active batch[kBatchRows];  // those of each row of a batch
  int32_t* sums;             // [workers, sums_stride]
  int64_t sums_stride;
  int16_t* partial;       // [workers, padded outputs]
  bool* is_filled;        // [workers] which of them had a piece
  const int32_t** parts;  // [workers] the sums of those
  uint8_t* gemm;          // [workers, gemm_bytes]
  int64_t gemm_bytes;
  float* y;  // [workers, y_stride] before conversion to float16
  int64_t y_stride;
  int64_t bytes;  // the scratch that all of this takes
};

struct Call {
  const qsk_variant& variant;
  const TernaryProduct& args;
  const qsk_parallel* parallel;
  int64_t workers;
  int64_t row_bytes;
  int64_t padded_outputs;  // that a row of sums has
  Workspace work;
};

int64_t workers_for(const TernaryProduct& args, const qsk_parallel* parallel) {
  const int64_t weight_bytes = args.k * args.row_bytes;
  return min_of(worker_count(parallel), max_of(1, weight_bytes / kBytesPerWorker * max_of(1, args.m)));
}

// Scratch of one row's selection.
int64_t selection_bytes(const TernaryProduct& args) {
  if (args.selection == nullptr) return 0;
  const Selection& selection = *args.selection;
  return round_up(selection.rescale_l2 ? select_bytes(selection, args.k) : quantize_selected_bytes(selection, args.k),
                  64);
}

int64_t sums_per_row(const TernaryProduct& args) { return round_up(args.row_bytes, kGemmTileBytes) * 4; }

Workspace lay_out(const TernaryProduct& args, int64_t workers, void* base) {
  Scratch scratch(base);
  Workspace work = {};
  const bool half = args.type == QSK_FLOAT16;
  const int64_t padded_outputs = sums_per_row(args);
  work.q_stride = round_up(args.k + kSlack, 64);
  const bool rescales = args.selection != nullptr && args.selection->rescale_l2;
  work.x = scratch.take<float>(half || rescales ? workers * args.k : 0);
  work.half = scratch.take<uint16_t>(half && rescales ? workers * args.k : 0);
  work.select_stride = selection_bytes(args);
  work.select = scratch.take<uint8_t>(workers * work.select_stride);
  work.q = scratch.take<int8_t>(args.m * work.q_stride);
  work.gamma = scratch.take<float>(args.m);
  work.tally = scratch.take<Tally>(args.m);
  work.active.index = scratch.take<int32_t>(args.k + kSlack);
  work.active.value = scratch.take<int8_t>(args.k + kSlack);
  const bool several = args.m > 1;
  for (int64_t row = 0; several && row < min_of(kBatchRows, args.m); ++row) {
    work.batch[row].index = scratch.take<int32_t>(args.k + kSlack);
    work.batch[row].value = scratch.take<int8_t>(args.k + kSlack);
  }
  work.sums_stride = min_of(kBatchRows, args.m) * padded_outputs;
  const bool has_tables = args.m >= kTableRows;
  const int64_t tile_stride = has_tables ? kTableTile.sums_stride : kGemmTile.sums_stride;
  if (several) work.sums_stride = max_of(work.sums_stride, min_of(kGemmTileRows, args.m) * tile_stride);
  work.sums = scratch.take<int32_t>(workers * work.sums_stride);
  work.partial = scratch.take<int16_t>(workers * padded_outputs);
  work.is_filled = scratch.take<bool>(workers);
  work.parts = scratch.take<const int32_t*>(workers);
  work.gemm_bytes = has_tables ? max_of(kTableWorkspaceBytes, kGemmCodesBytes) : kGemmCodesBytes;
  work.gemm = scratch.take<uint8_t>(several ? workers * work.gemm_bytes : 0);
  work.y_stride = max_of(kGemmTileOutputs, kFinishPiece);
  work.y = scratch.take<float>(half ? workers * work.y_stride : 0);
  work.bytes = scratch.used();
  return work;
}

// A rescaled row as float32, exactly as the op TopKSparsify would hand it on.
void rescale(const Call& call, const float* x, void* select, uint16_t* rounded, float* y) {
  const int64_t k = call.args.k;
  sparsify_row(*call.variant.topk, *call.args.selection, x, k, select, y);
  if (call.args.type != QSK_FLOAT16) return;
  call.variant.half->from_float(y, k, rounded);
  call.variant.half->to_float(rounded, k, y);
}

QuantizedRow quantize(const Call& call, int64_t row, int64_t worker) {
  const TernaryProduct& args = call.args;
  const QuantizeKernels& kernels = *call.variant.quantize;
  int8_t* q = call.work.q + row * call.work.q_stride;
  memset(q + args.k, 0, call.work.q_stride - args.k);
  float* own = call.work.x + worker * args.k;
  const float* x = own;
  if (args.type == QSK_FLOAT16) {
    call.variant.half->to_float(static_cast<const uint16_t*>(args.x) + row * args.k, args.k, own);
  } else {
    x = static_cast<const float*>(args.x) + row * args.k;
  }
  if (args.selection == nullptr) return {quantize_row(kernels, x, args.k, q), 1};
  uint8_t* select = call.work.select + worker * call.work.select_stride;
  if (args.selection->rescale_l2) {
    rescale(call, x, select, call.work.half + worker * args.k, own);
    return {quantize_row(kernels, own, args.k, q), 1};
  }
  return quantize_selected_row(kernels, *call.variant.topk, *args.selection, x, args.k, select, q);
}

// The sums of one row: those of the padded output `begin`, a multiple of kGemmTileOutputs, start at `offset` of each
// part.
struct Sums {
  const int32_t* const* parts;
  int64_t part_count;
  int64_t offset;
  int64_t begin;
};

// out[0 .. to - from) = the results of the padded outputs from..to-1, which belong to one matrix.
void descale(const Call& call, const Sums& sums, int64_t row, int64_t from, int64_t to, float scale, float* out) {
  const TernaryKernels& kernels = *call.variant.ternary;
  const float factor = (call.work.gamma[row] / 127.0f) * scale;
  const int32_t q_sum = call.work.tally[row].sum;
  const int64_t odd = (from - sums.begin) % kGemmTileOutputs;
  const int64_t start = sums.offset - sums.begin;
  if (odd != 0) {  // a matrix that starts within a block of sums
    float block[kGemmTileOutputs];
    const int64_t n = min_of(to - from, kGemmTileOutputs - odd);
    kernels.finish(sums.parts, sums.part_count, start + from - odd, kGemmTileOutputs, q_sum, factor, block);
    memcpy(out, block + odd, n * sizeof *out);
    from += n;
    out += n;
  }
  if (from < to) kernels.finish(sums.parts, sums.part_count, start + from, to - from, q_sum, factor, out);
}

void prefetch_row(const TernaryProduct& args, int64_t position, int64_t count) {
  const int64_t element = args.type == QSK_FLOAT16 ? 2 : 4;
  const uint8_t* const y = static_cast<const uint8_t*>(args.y) + position * element;
  for (int64_t i = 0; i < count * element; i += kLineBytes) __builtin_prefetch(y + i, 1);
}

// Writes the results of the padded outputs sums.begin..end-1 of `row`; `y` is float32 scratch for float16 results.
void finish(const Call& call, const Sums& sums, int64_t row, int64_t end, float* y) {
  const TernaryProduct& args = call.args;
  const bool half = args.type == QSK_FLOAT16;
  for (int64_t i = 0; i < args.matrix_count; ++i) {
    const TernaryMatrix& matrix = args.matrices[i];
    const int64_t from = max_of(sums.begin, matrix.begin), to = min_of(end, matrix.begin + matrix.n);
    if (from >= to) continue;
    const int64_t position = row * args.outputs + matrix.y_begin + from - matrix.begin;
    float* out = half ? y : static_cast<float*>(args.y) + position;
    if (row + 1 < args.m) prefetch_row(args, position + args.outputs, to - from);  // of a tile, finished next
    if (isnan(call.work.gamma[row])) {
      for (int64_t j = 0; j < to - from; ++j) out[j] = NAN;
    } else {
      descale(call, sums, row, from, to, matrix.scale, out);
    }
    if (half) call.variant.half->from_float(out, to - from, static_cast<uint16_t*>(args.y) + position);
  }
}

// The rows of weights of `count` active channels from `begin` on.
TernaryRows rows_of(const Call& call, const Active& active, int64_t begin, int64_t count, int64_t worker) {
  TernaryRows rows = {};
  rows.w = call.args.w;
  rows.row_bytes = call.row_bytes;
  rows.index = active.index + begin;
  rows.value = active.value + begin;
  rows.count = count;
  rows.partial = call.work.partial + worker * call.padded_outputs;
  rows.begins = rows.ends = true;
  return rows;
}

int32_t magnitude(const int8_t* values, int64_t count) {
  int32_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += values[i] < 0 ? -values[i] : values[i];
  return sum;
}

// Takes pieces of the active channels until none is left and adds their rows to this worker's sums.
void add_pieces(const Call& call, const Active& active, int64_t piece_channels, Pieces& pieces, int64_t worker) {
  int64_t piece = pieces.take();
  if (piece < 0) return;
  int32_t* sums = call.work.sums + worker * call.work.sums_stride;
  memset(sums, 0, call.work.sums_stride * sizeof *sums);
  call.work.is_filled[worker] = true;
  bool begins = true;
  const int64_t first = piece * piece_channels;
  int32_t next_magnitude = magnitude(active.value + first, min_of(kGemvRows, active.count - first));
  int32_t partial_magnitude = 0;  // of what the int16 sums hold
  while (piece >= 0) {
    const int64_t next_piece = pieces.take();  // one ahead, so that its rows can be prefetched
    const int64_t end = min_of(active.count, (piece + 1) * piece_channels);
    for (int64_t begin = piece * piece_channels; begin < end; begin += kGemvRows) {
      const int64_t count = min_of(kGemvRows, end - begin);
      int64_t next = begin + count;
      if (next >= end) next = next_piece >= 0 ? next_piece * piece_channels : active.count;
      TernaryRows rows = rows_of(call, active, begin, count, worker);
      rows.next = active.index + next;
      rows.next_count = min_of(kGemvRows, active.count - next);
      partial_magnitude = begins ? next_magnitude : partial_magnitude + next_magnitude;
      next_magnitude = magnitude(active.value + next, rows.next_count);
      rows.begins = begins;
      rows.ends = rows.next_count == 0 || partial_magnitude + next_magnitude > kMostMagnitude;
      call.variant.ternary->gemv(rows, sums);
      begins = rows.ends;
    }
    piece = next_piece;
  }
}

// y[first .. first + count) from the sums of all workers that had work, those of row `first` first.
void finish_rows(const Call& call, int64_t workers, int64_t first, int64_t count) {
  const Workspace& work = call.work;
  int64_t part_count = 0;
  for (int64_t worker = 0; worker < workers; ++worker) {
    if (work.is_filled[worker]) work.parts[part_count++] = work.sums + worker * work.sums_stride;
  }
  const int64_t n = 4 * call.row_bytes, pieces_per_row = ceil_div(n, kFinishPiece);
  Pieces pieces(count * pieces_per_row);
  auto body = [&](int64_t worker) {
    for (int64_t piece = pieces.take(); piece >= 0; piece = pieces.take()) {
      const int64_t row = piece / pieces_per_row, begin = piece % pieces_per_row * kFinishPiece;
      const Sums sums = {work.parts, part_count, row * call.padded_outputs + begin, begin};
      finish(call, sums, first + row, min_of(n, begin + kFinishPiece), work.y + worker * work.y_stride);
    }
  };
  run_workers(call.parallel, min_of(workers, count * n / kFinishPiece), body);
}

// One row: the workers share the active channels, so that each reads whole rows of weights, and their sums are added.
void multiply_row(const Call& call) {
  const Workspace& work = call.work;
  Active active = work.active;
  const QuantizedRow row = quantize(call, 0, 0);
  work.gamma[0] = row.gamma;
  work.tally[0] = call.variant.quantize->compact(work.q, call.args.k, row.least, active.index, active.value);
  active.count = work.tally[0].active;

  const int64_t workers = min_of(call.workers, max_of(1, active.count * call.row_bytes / kBytesPerWorker));
  const int64_t piece_channels = workers == 1 ? round_up(max_of(1, active.count), kGemvRows)
                                              : round_up(ceil_div(kPieceBytes, call.row_bytes), kGemvRows);
  Pieces pieces(ceil_div(active.count, piece_channels));
  memset(work.is_filled, 0, workers * sizeof *work.is_filled);
  auto accumulate = [&](int64_t worker) { add_pieces(call, active, piece_channels, pieces, worker); };
  run_workers(call.parallel, workers, accumulate);

  finish_rows(call, workers, 0, 1);
}

// Lists the channels that are active in any row, or all of them where that is nearly all.
Active unite(const Call& call) {
  const Workspace& work = call.work;
  const int64_t m = call.args.m, k = call.args.k;
  Active active = work.active;
  int8_t* any = active.value;  // nonzero where any row is
  memset(any, 0, k);
  constexpr int64_t kRowsBetweenChecks = 8;
  bool dense = false;
  for (int64_t row = 0; row < m && !dense; ++row) {
    const int8_t* q = work.q + row * work.q_stride;
    for (int64_t c = 0; c < k; ++c) any[c] |= q[c];
    if ((row + 1) % kRowsBetweenChecks == 0 || row + 1 == m) dense = k > 0 && memchr(any, 0, k) == nullptr;
  }
  if (!dense) {
    active.count = 0;
    for (int64_t c = 0; c < k; ++c) {
      active.index[active.count] = static_cast<int32_t>(c);
      active.count += any[c] != 0;
    }
    constexpr int64_t kWorthClosing = 16;  // closing the gaps pays when at least a 16th of the channels goes
    dense = k - active.count < k / kWorthClosing || k == active.count;
  }
  if (dense) {
    active.count = k;
    for (int64_t c = 0; c < k; ++c) active.index[c] = static_cast<int32_t>(c);
  }
  for (int64_t c = active.count; c % kGemmChannelGroup != 0; ++c) active.index[c] = active.index[c - 1];  // with q = 0
  return active;
}

void close_gaps(const Call& call, const Active& active, int64_t row) {
  int8_t* q = call.work.q + row * call.work.q_stride;
  for (int64_t c = 0; c < active.count; ++c) q[c] = q[active.index[c]];
  for (int64_t c = active.count; c % kGemmChannelGroup != 0; ++c) q[c] = 0;
}

// In units of the GEMV's time per channel and row.
float cost_of(const TernaryGemm& gemm, int64_t m, const Active& any) {
  const float rows = static_cast<float>(round_up(m, gemm.shape.row_group));
  return static_cast<float>(any.count) * (gemm.cost.unpack + gemm.cost.multiply * rows);
}

// The GEMM that costs less over `any`, the union; NULL where each row on its own, skipping what is inactive in it,
// costs less than either.
const TernaryGemm* cheapest(const Call& call, const Active& any) {
  const TernaryKernels& kernels = *call.variant.ternary;
  const TernaryGemm* best = &kernels.gemm;
  float cost = cost_of(*best, call.args.m, any);
  if (call.args.m >= kTableRows && kernels.tables != nullptr) {
    const float of_tables = cost_of(*kernels.tables, call.args.m, any);
    if (of_tables < cost) {
      best = kernels.tables;
      cost = of_tables;
    }
  }
  int64_t active = 0;
  for (int64_t row = 0; row < call.args.m; ++row) active += call.work.tally[row].active;
  return kernels.batch_cost * static_cast<float>(active) <= cost ? nullptr : best;
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

// Takes pieces of all channels until none is left. The first row of a batch that adds up a piece brings its weights
// into the cache, unless they were prefetched during the piece before.
void add_batch_pieces(const Call& call, const Active* batch, int64_t rows, const Active& any, int64_t piece_channels,
                      Pieces& pieces, int64_t worker) {
  int64_t piece = pieces.take();
  if (piece < 0) return;
  int32_t* sums = call.work.sums + worker * call.work.sums_stride;
  memset(sums, 0, rows * call.padded_outputs * sizeof *sums);
  call.work.is_filled[worker] = true;
  while (piece >= 0) {
    const int64_t next_piece = pieces.take();
    int64_t ahead = next_piece < 0 ? 0 : position_of(any, next_piece * piece_channels);
    const int64_t ahead_end = next_piece < 0 ? 0 : position_of(any, (next_piece + 1) * piece_channels);
    for (int64_t row = 0; row < rows; ++row) {
      const Active& active = batch[row];
      const int64_t end = position_of(active, (piece + 1) * piece_channels);
      for (int64_t begin = position_of(active, piece * piece_channels); begin < end; begin += kGemvRows) {
        TernaryRows channels = rows_of(call, active, begin, min_of(kGemvRows, end - begin), worker);
        channels.next = any.index + ahead;
        channels.next_count = min_of(kGemvRows, ahead_end - ahead);
        channels.is_cached = row > 0;
        call.variant.ternary->gemv(channels, sums + row * call.padded_outputs);
        ahead += channels.next_count;
      }
    }
    piece = next_piece;
  }
}

// Rows in batches: one pass over the weights for each batch, in pieces that all of its rows find in the cache.
void multiply_batches(const Call& call, const Active& any) {
  const Workspace& work = call.work;
  const int64_t m = call.args.m, k = call.args.k;
  const int64_t piece_channels = round_up(ceil_div(kBatchBytes, call.row_bytes), kGemvRows);
  const int64_t workers = min_of(call.workers, ceil_div(k, piece_channels));
  for (int64_t first = 0; first < m; first += kBatchRows) {
    const int64_t rows = min_of(kBatchRows, m - first);
    Active batch[kBatchRows];
    for (int64_t row = 0; row < rows; ++row) {
      Active& active = batch[row] = work.batch[row];
      const int8_t* q = work.q + (first + row) * work.q_stride;
      active.count = call.variant.quantize->compact(q, k, 1, active.index, active.value).active;
    }
    Pieces pieces(ceil_div(k, piece_channels));
    memset(work.is_filled, 0, max_of(1, workers) * sizeof *work.is_filled);
    auto body = [&](int64_t worker) { add_batch_pieces(call, batch, rows, any, piece_channels, pieces, worker); };
    run_workers(call.parallel, workers, body);
    finish_rows(call, workers, first, rows);
  }
}

struct Tiling {
  const TernaryGemm& gemm;
  int64_t columns;  // tiles over the outputs
  int64_t rows;     // tiles over m
  int64_t tile_rows;
};

// The weights of the tile at `position` from the active channel `begin` on.
TileWeights weights_of(const Call& call, const Active& active, const Tiling& tiling, int64_t position, int64_t begin) {
  const TileShape& shape = tiling.gemm.shape;
  return {call.args.w + position / tiling.rows * shape.bytes, active.index + begin,
          min_of(shape.channels, active.count - begin)};
}

void multiply_tile(const Call& call, const Active& active, const Tiling& tiling, int64_t position, int64_t next,
                   int64_t worker) {
  const Workspace& work = call.work;
  const TileShape& shape = tiling.gemm.shape;
  const int64_t first_byte = position / tiling.rows * shape.bytes;
  const int64_t first_row = position % tiling.rows * tiling.tile_rows;
  TernaryTile tile = {};
  tile.row_bytes = call.row_bytes;
  tile.bytes = min_of(shape.bytes, call.row_bytes - first_byte);
  tile.q_stride = work.q_stride;
  tile.rows = min_of(tiling.tile_rows, call.args.m - first_row);
  tile.workspace = work.gemm + worker * work.gemm_bytes;
  int32_t* sums = work.sums + worker * work.sums_stride;
  memset(sums, 0, tile.rows * shape.sums_stride * sizeof *sums);
  const int64_t step = min_of(shape.channels, active.count);
  for (int64_t begin = 0; begin < active.count; begin += step) {
    const int64_t end = begin + step;
    tile.weights = weights_of(call, active, tiling, position, begin);
    tile.next = end < active.count ? weights_of(call, active, tiling, position, end)
                : next >= 0        ? weights_of(call, active, tiling, next, 0)
                                   : TileWeights{};
    tile.weights.channels = round_up(tile.weights.channels, kGemmChannelGroup);
    tile.q = work.q + first_row * work.q_stride + begin;
    tiling.gemm.multiply(tile, sums);
  }
  const int64_t first_output = first_byte * 4;
  for (int64_t r = 0; r < tile.rows; ++r) {
    const int32_t* part = sums + r * shape.sums_stride;
    finish(call, {&part, 1, 0, first_output}, first_row + r, first_output + 4 * tile.bytes,
           work.y + worker * work.y_stride);
  }
}

// Tiles of as many rows as possible, as each unpacks its weights anew, but enough of them for all workers.
Tiling tiling_of(const Call& call, const TernaryGemm& gemm) {
  constexpr int64_t kLeastRows = 16;
  constexpr int64_t kTilesPerWorker = 4;
  const int64_t m = call.args.m, multiple = max_of(4, gemm.shape.row_group);
  Tiling tiling = {gemm, ceil_div(call.row_bytes, gemm.shape.bytes), 0, 0};
  const int64_t tiles = call.workers > 1 ? kTilesPerWorker * call.workers : 1;
  tiling.rows = max_of(ceil_div(m, kGemmTileRows), min_of(ceil_div(m, kLeastRows), ceil_div(tiles, tiling.columns)));
  tiling.tile_rows = min_of(kGemmTileRows, round_up(ceil_div(m, tiling.rows), multiple));  // of like size
  tiling.rows = ceil_div(m, tiling.tile_rows);
  return tiling;
}

void multiply_rows(const Call& call, const TernaryGemm& gemm, const Active& active) {
  const int64_t m = call.args.m;
  if (active.count < call.args.k) {
    Pieces rows(m);
    auto body = [&](int64_t) {
      for (int64_t row = rows.take(); row >= 0; row = rows.take()) close_gaps(call, active, row);
    };
    run_workers(call.parallel, min_of(call.workers, m), body);
  }
  const Tiling tiling = tiling_of(call, gemm);
  Pieces tiles(tiling.columns * tiling.rows);
  auto body = [&](int64_t worker) {
    int64_t tile = tiles.take();
    while (tile >= 0) {
      const int64_t next = tiles.take();  // one ahead, so that its weights can be prefetched
      multiply_tile(call, active, tiling, tile, next, worker);
      tile = next;
    }
  };
  run_workers(call.parallel, min_of(call.workers, tiling.columns * tiling.rows), body);
}

}  // namespace

int64_t ternary_product_scratch_bytes(const TernaryProduct& product, const qsk_parallel* parallel) {
  return lay_out(product, workers_for(product, parallel), nullptr).bytes;
}

int ternary_product(const qsk_variant& variant, const TernaryProduct& product, const qsk_parallel* parallel,
                    void* scratch, int64_t scratch_bytes) {
  const int64_t m = product.m;
  if (m == 0 || product.outputs == 0) return QSK_OK;
  if (product.y == nullptr || scratch == nullptr) return QSK_NULL_ARGUMENT;
  if (product.k > 0 && (product.x == nullptr || product.w == nullptr)) return QSK_NULL_ARGUMENT;
  const int64_t workers = workers_for(product, parallel);
  const Workspace work = lay_out(product, workers, scratch);
  if (scratch_bytes < work.bytes) return QSK_SCRATCH_TOO_SMALL;
  const Call call = {variant, product, parallel, workers, product.row_bytes, sums_per_row(product), work};

  if (m == 1) {
    multiply_row(call);
    return QSK_OK;
  }
  Pieces rows(m);
  auto quantize_rows = [&](int64_t worker) {
    for (int64_t row = rows.take(); row >= 0; row = rows.take()) {
      const QuantizedRow quantized = quantize(call, row, worker);
      work.gamma[row] = quantized.gamma;
      work.tally[row] = variant.quantize->drop_below(work.q + row * work.q_stride, product.k, quantized.least);
    }
  };
  run_workers(parallel, m * product.k < kQuantizePiece ? 1 : min_of(workers, m), quantize_rows);
  const Active any = unite(call);
  const TernaryGemm* const gemm = cheapest(call, any);
  if (gemm == nullptr) {
    multiply_batches(call, any);
  } else {
    multiply_rows(call, *gemm, any);
  }
  return QSK_OK;
}

}  // namespace qsk
