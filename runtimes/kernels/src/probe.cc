#include "qsk/probe.h"

#include <atomic>

#include "work.h"

namespace qsk {
namespace {

constexpr int64_t kLineBytes = 64;
constexpr int64_t kPieceBytes = 64 << 10;

// Vectors of the baseline, so that summing is faster than any cache delivers.
typedef uint64_t Words __attribute__((vector_size(16), aligned(1), may_alias));

constexpr int64_t kMostTogether = 16;

Words at(const uint8_t* p) { return *reinterpret_cast<const Words*>(p); }

// The row at position `position`, or null beyond the last one.
const uint8_t* row_at(const qsk_probe_args& args, int64_t position) {
  return position < args.count ? args.base + args.index[position] * args.row_bytes : nullptr;
}

// The sum of `count` rows from position `first` on.
uint64_t sum_rows(const qsk_probe_args& args, int64_t first, int64_t count) {
  const uint8_t* rows[kMostTogether];
  const uint8_t* ahead[kMostTogether];
  for (int64_t i = 0; i < count; ++i) {
    rows[i] = row_at(args, first + i);
    ahead[i] = args.ahead > 0 ? row_at(args, first + i + args.ahead) : nullptr;
  }
  Words a = {}, b = {}, c = {}, d = {};
  for (int64_t byte = 0; byte < args.row_bytes; byte += kLineBytes) {
    const bool is_half = args.row_bytes - byte < kLineBytes;
    for (int64_t i = 0; i < count; ++i) {
      if (ahead[i] != nullptr) __builtin_prefetch(ahead[i] + byte);
      a += at(rows[i] + byte);
      b += at(rows[i] + byte + 16);
      if (is_half) continue;
      c += at(rows[i] + byte + 32);
      d += at(rows[i] + byte + 48);
    }
  }
  a += b + c + d;
  return a[0] + a[1];
}

}  // namespace
}  // namespace qsk

int qsk_probe_read(const qsk_probe_args* args, const qsk_parallel* parallel, uint64_t* sum) {
  if (args == nullptr || sum == nullptr) return QSK_NULL_ARGUMENT;
  if (args->count < 0 || args->row_bytes < 0 || args->row_bytes % 32 != 0 || args->ahead < 0) return QSK_BAD_SIZE;
  if (args->together < 1 || args->together > qsk::kMostTogether) return QSK_BAD_SIZE;
  *sum = 0;
  if (args->count == 0 || args->row_bytes == 0) return QSK_OK;
  if (args->base == nullptr || args->index == nullptr) return QSK_NULL_ARGUMENT;
  const int64_t piece_rows = qsk::round_up(qsk::ceil_div(qsk::kPieceBytes, args->row_bytes), args->together);
  qsk::Pieces pieces(qsk::ceil_div(args->count, piece_rows));
  std::atomic<uint64_t> total{0};
  auto body = [&](int64_t) {
    uint64_t own = 0;
    for (int64_t piece = pieces.take(); piece >= 0; piece = pieces.take()) {
      const int64_t end = qsk::min_of(args->count, (piece + 1) * piece_rows);
      for (int64_t first = piece * piece_rows; first < end; first += args->together) {
        own += qsk::sum_rows(*args, first, qsk::min_of(args->together, end - first));
      }
    }
    total.fetch_add(own, std::memory_order_relaxed);
  };
  qsk::run_workers(parallel, qsk::worker_count(parallel), body);
  *sum = total.load(std::memory_order_relaxed);
  return QSK_OK;
}
