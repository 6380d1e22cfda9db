#include "qsk/cached_attention.h"

#include <math.h>
#include <string.h>

#include "kernels.h"
#include "work.h"

namespace qsk {
namespace {

using Args = qsk_cached_attention_args;

// Below that many multiplications a second thread costs more than it brings.
constexpr int64_t kProductsPerWorker = 100000;

int check(const Args* args) {
  if (args == nullptr) return QSK_NULL_ARGUMENT;
  if (args->type != QSK_FLOAT32 && args->type != QSK_FLOAT16) return QSK_BAD_TYPE;
  const int64_t sizes[] = {args->batch,    args->tokens, args->total,        args->heads,
                           args->kv_heads, args->width,  args->past_capacity};
  double elements = 1;
  for (int64_t size : sizes) {
    if (size < 0 || size > INT32_MAX) return QSK_BAD_SIZE;
    elements *= size > 0 ? static_cast<double>(size) : 1;
  }
  if (elements > 1e18) return QSK_BAD_SIZE;  // no product of sizes below overflows
  if (args->kv_heads == 0 || args->heads % args->kv_heads != 0 || args->width % 2 != 0) return QSK_BAD_SIZE;
  if (args->tokens > args->total || args->past_capacity < args->total - args->tokens) return QSK_BAD_SIZE;
  return QSK_OK;
}

// How one call is cut. Rows are the queries of one KV head, all its heads of one token side by side. A piece of work is
// a block of rows; when there are fewer blocks than threads, each chunk of keys is a piece of its own, and the chunks
// are merged afterwards in the order in which one thread would.
struct Plan {
  Plan(const Args& args, const qsk_parallel* parallel)
      : group(args.heads / args.kv_heads),
        rows(group * args.tokens),
        blocks(ceil_div(rows, kAttendRows)),
        chunks(max_of(1, ceil_div(args.total, kAttendKeys))),
        sets(args.batch * args.kv_heads) {
    const int64_t useful = max_of(1, sets * rows * args.total * args.width / kProductsPerWorker);
    workers = min_of(worker_count(parallel), useful);
    is_split = chunks > 1 && workers > 1 && sets * blocks < 2 * workers;
    pieces = sets * blocks * (is_split ? chunks : 1);
    workers = min_of(workers, max_of(1, pieces));
  }
  int64_t group, rows, blocks, chunks, sets, workers, pieces;
  bool is_split;
};

struct Partial {
  float* largest;  // [kAttendRows]
  float* total;    // [kAttendRows]
  float* sums;     // [kAttendRows, width]
};

Partial take_partial(Scratch& scratch, const Args& args, int64_t rows) {
  return {scratch.take<float>(rows), scratch.take<float>(rows), scratch.take<float>(rows * args.width)};
}

struct Worker {
  float* scores;
  float* key;  // a chunk of a float16 cache
  float* value;
  float* row;  // 3 rows of width: what a float16 row becomes, and its turned form
  Partial chunk;
  Partial all;
};

Worker take_worker(Scratch& scratch, const Args& args) {
  const int64_t converted = args.type == QSK_FLOAT16 ? kAttendKeys * args.width : 0;
  Worker worker = {};
  worker.scores = scratch.take<float>(kAttendRows * kAttendKeys);
  worker.key = scratch.take<float>(converted);
  worker.value = scratch.take<float>(converted);
  worker.row = scratch.take<float>(4 * args.width);
  worker.chunk = take_partial(scratch, args, kAttendRows);
  worker.all = take_partial(scratch, args, kAttendRows);
  return worker;
}

int64_t worker_bytes(const Args& args) {
  Scratch count(nullptr);
  take_worker(count, args);
  return count.used();
}

int64_t partial_bytes(const Args& args) {
  Scratch count(nullptr);
  take_partial(count, args, kAttendRows);
  return count.used();
}

class Attention {
 public:
  Attention(const qsk_variant& variant, const Args& args, const Plan& plan, Scratch scratch)
      : variant_(variant),
        args_(args),
        plan_(plan),
        bytes_(args.type == QSK_FLOAT16 ? 2 : 4),
        capacity_(max_of(args.past_capacity, args.total)),
        queries_(scratch.take<float>(plan.sets * plan.rows * args.width)),
        workers_(scratch.take<uint8_t>(plan.workers * worker_bytes(args))),
        partials_(scratch.take<uint8_t>(plan.is_split ? plan.pieces * partial_bytes(args) : 0)) {}

  void run(const qsk_parallel* parallel) {
    // New keys and values first: every piece may read them. One short row per token and head, unless the past is
    // copied.
    const bool copies = args_.past_key != args_.present_key || args_.past_value != args_.present_value;
    const bool is_short = !copies && args_.tokens * args_.batch <= 4;
    Pieces sets(plan_.sets);
    auto prepare = [&](int64_t worker) {
      const Worker own = worker_at(worker);
      for (int64_t set = sets.take(); set >= 0; set = sets.take()) prepare_set(own, set);
    };
    run_workers(parallel, is_short ? 1 : min_of(plan_.workers, plan_.sets), prepare);
    Pieces pieces(plan_.pieces);
    auto attend = [&](int64_t worker) {
      const Worker own = worker_at(worker);
      for (int64_t piece = pieces.take(); piece >= 0; piece = pieces.take()) attend_piece(own, piece);
    };
    run_workers(parallel, plan_.workers, attend);
    if (!plan_.is_split) return;
    const Worker own = worker_at(0);
    for (int64_t block = 0; block < plan_.sets * plan_.blocks; ++block) {
      Partial all = partial_at(block * plan_.chunks);
      for (int64_t chunk = 1; chunk < plan_.chunks; ++chunk) {
        merge(rows_of(block), all, partial_at(block * plan_.chunks + chunk));
      }
      write(own, block, all);
    }
  }

 private:
  Worker worker_at(int64_t index) const {
    Scratch scratch(workers_ + index * worker_bytes(args_));
    return take_worker(scratch, args_);
  }
  Partial partial_at(int64_t piece) const {
    Scratch scratch(partials_ + piece * partial_bytes(args_));
    return take_partial(scratch, args_, kAttendRows);
  }
  int64_t rows_of(int64_t block) const { return min_of(kAttendRows, plan_.rows - block % plan_.blocks * kAttendRows); }
  const uint8_t* at(const void* base, int64_t element) const {
    return static_cast<const uint8_t*>(base) + element * bytes_;
  }
  uint8_t* at(void* base, int64_t element) const { return static_cast<uint8_t*>(base) + element * bytes_; }

  // `count` elements as float32: where they are, or converted into `place`.
  const float* floats(const void* base, int64_t element, int64_t count, float* place) const {
    if (bytes_ == 4) return static_cast<const float*>(base) + element;
    variant_.half->to_float(static_cast<const uint16_t*>(base) + element, count, place);
    return place;
  }
  void write_floats(const float* x, int64_t count, void* base, int64_t element) const {
    if (bytes_ == 4) {
      float* place = static_cast<float*>(base) + element;
      if (place != x) memcpy(place, x, count * sizeof *x);
    } else {
      variant_.half->from_float(x, count, static_cast<uint16_t*>(base) + element);
    }
  }

  // The cache of one KV head of one sequence, and the turned queries of its heads.
  void prepare_set(const Worker& own, int64_t set) const {
    const int64_t width = args_.width, filled = args_.total - args_.tokens;
    copy_past(args_.past_key, args_.present_key, set);
    copy_past(args_.past_value, args_.present_value, set);
    const int64_t sequence = set / args_.kv_heads, kv_head = set % args_.kv_heads;
    const float factor = static_cast<float>(1.0 / sqrt(static_cast<double>(width)));
    float* turned = own.row + 3 * width;
    for (int64_t token = 0; token < args_.tokens; ++token) {
      const int64_t position = sequence * args_.tokens + token;
      const float* cosine = floats(args_.cosine, position * (width / 2), width / 2, own.row);
      const float* sine = floats(args_.sine, position * (width / 2), width / 2, own.row + width);
      const int64_t in_row = position * (args_.heads + 2 * args_.kv_heads) * width;
      float* row = own.row + 2 * width;
      for (int64_t head = 0; head < plan_.group; ++head) {
        const float* q = floats(args_.qkv, in_row + (kv_head * plan_.group + head) * width, width, row);
        float* place = queries_ + (set * plan_.rows + token * plan_.group + head) * width;
        variant_.layer->rotate(q, cosine, sine, width, factor, place);
      }
      const int64_t cached = (set * capacity_ + filled + token) * width;
      const float* key = floats(args_.qkv, in_row + (args_.heads + kv_head) * width, width, row);
      variant_.layer->rotate(key, cosine, sine, width, 1.0f, turned);
      write_floats(turned, width, args_.present_key, cached);
      const int64_t value = in_row + (args_.heads + args_.kv_heads + kv_head) * width;
      memcpy(at(args_.present_value, cached), at(args_.qkv, value), width * bytes_);
    }
  }

  void copy_past(const void* past, void* present, int64_t set) const {
    if (past == present) return;
    const int64_t width = args_.width, filled = args_.total - args_.tokens;
    const uint8_t* from = at(past, set * args_.past_capacity * width);
    uint8_t* to = at(present, set * capacity_ * width);
    if (filled > 0) memcpy(to, from, filled * width * bytes_);
    const int64_t rest = args_.past_capacity - args_.total;
    if (rest > 0) memcpy(to + args_.total * width * bytes_, from + args_.total * width * bytes_, rest * width * bytes_);
  }

  void attend_piece(const Worker& own, int64_t piece) const {
    if (plan_.is_split) {
      attend_chunk(own, piece / plan_.chunks, piece % plan_.chunks, partial_at(piece));
      return;
    }
    attend_chunk(own, piece, 0, own.all);
    for (int64_t chunk = 1; chunk < plan_.chunks; ++chunk) {
      attend_chunk(own, piece, chunk, own.chunk);
      merge(rows_of(piece), own.all, own.chunk);
    }
    write(own, piece, own.all);
  }

  void attend_chunk(const Worker& own, int64_t block, int64_t chunk, const Partial& result) const {
    const int64_t set = block / plan_.blocks, first_row = block % plan_.blocks * kAttendRows, width = args_.width;
    const int64_t rows = rows_of(block), sequence = set / args_.kv_heads, begin = chunk * kAttendKeys;
    const uint8_t* visible[kAttendRows];
    int64_t end = 0;  // behind the last key that any row may look at
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t token = sequence * args_.tokens + (first_row + row) / plan_.group;
      visible[row] = args_.visible + token * args_.total + begin;
      int64_t last = row > 0 && visible[row] == visible[row - 1] ? 0 : min_of(kAttendKeys, args_.total - begin);
      while (last > end && !visible[row][last - 1]) --last;
      end = max_of(end, last);
    }
    const int64_t cached = (set * capacity_ + begin) * width;
    AttendBlock task = {};
    task.q = queries_ + (set * plan_.rows + first_row) * width;
    task.rows = rows;
    task.key = floats(args_.present_key, cached, end * width, own.key);
    task.value = floats(args_.present_value, cached, end * width, own.value);
    task.keys = end;
    task.width = width;
    task.visible = visible;
    task.scores = own.scores;
    task.largest = result.largest;
    task.total = result.total;
    task.sums = result.sums;
    variant_.layer->attend(task);
  }

  void merge(int64_t rows, const Partial& into, const Partial& other) const {
    for (int64_t row = 0; row < rows; ++row) {
      AttendedRow mine = {into.largest[row], into.total[row], into.sums + row * args_.width};
      variant_.layer->merge(args_.width, &mine, {other.largest[row], other.total[row], other.sums + row * args_.width});
      into.largest[row] = mine.largest;
      into.total[row] = mine.total;
    }
  }

  void write(const Worker& own, int64_t block, const Partial& result) const {
    const int64_t set = block / plan_.blocks, first_row = block % plan_.blocks * kAttendRows, width = args_.width;
    for (int64_t row = 0; row < rows_of(block); ++row) {
      const int64_t token = set / args_.kv_heads * args_.tokens + (first_row + row) / plan_.group;
      const int64_t head = set % args_.kv_heads * plan_.group + (first_row + row) % plan_.group;
      const float* sums = result.sums + row * width;
      for (int64_t i = 0; i < width; ++i) own.row[i] = sums[i] / result.total[row];
      write_floats(own.row, width, args_.y, (token * args_.heads + head) * width);
    }
  }

  const qsk_variant& variant_;
  const Args& args_;
  const Plan& plan_;
  const int64_t bytes_;
  const int64_t capacity_;
  float* const queries_;  // [sets, rows, width]
  uint8_t* const workers_;
  uint8_t* const partials_;
};

}  // namespace
}  // namespace qsk

int64_t qsk_cached_attention_scratch_bytes(const qsk_cached_attention_args* args, const qsk_parallel* parallel) {
  if (qsk::check(args) != QSK_OK) return 0;
  const qsk::Plan plan(*args, parallel);
  qsk::Scratch scratch(nullptr);
  scratch.take<float>(plan.sets * plan.rows * args->width);
  scratch.take<uint8_t>(plan.workers * qsk::worker_bytes(*args));
  scratch.take<uint8_t>(plan.is_split ? plan.pieces * qsk::partial_bytes(*args) : 0);
  return scratch.used();
}

int qsk_cached_attention(const qsk_variant* variant, const qsk_cached_attention_args* args,
                         const qsk_parallel* parallel, void* scratch, int64_t scratch_bytes) {
  int status = qsk::check(args);
  if (status == QSK_OK) status = qsk::resolve_variant(&variant);
  if (status != QSK_OK) return status;
  if (args->batch == 0 || args->width == 0 || args->total == 0) return QSK_OK;
  if (args->present_key == nullptr || args->present_value == nullptr || scratch == nullptr) return QSK_NULL_ARGUMENT;
  const void* needed[] = {args->qkv, args->cosine, args->sine, args->visible, args->y};
  for (const void* pointer : needed) {
    if (args->tokens > 0 && pointer == nullptr) return QSK_NULL_ARGUMENT;
  }
  if (args->past_capacity > 0 && (args->past_key == nullptr || args->past_value == nullptr)) return QSK_NULL_ARGUMENT;
  const bool is_shared = args->past_key == args->present_key || args->past_value == args->present_value;
  if (is_shared && args->past_capacity < args->total) return QSK_BAD_SIZE;
  if (scratch_bytes < qsk_cached_attention_scratch_bytes(args, parallel)) return QSK_SCRATCH_TOO_SMALL;
  const qsk::Plan plan(*args, parallel);
  qsk::Attention(*variant, *args, plan, qsk::Scratch(scratch)).run(parallel);
  return QSK_OK;
}
