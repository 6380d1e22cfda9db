#include "qsk/probe.h"

#include <atomic>

#include "work.h"

namespace qsk {
namespace {

constexpr int64_t kLineBytes = 64;
constexpr int64_t kPieceBytes = 64 << 10;

// Vectors of the baseline, so that summing is faster than any cache delivers.
typedef uint64_t Words __attribute__((vector_size(16), aligned(1), may_alias));

Words at(const uint8_t* p) { return *reinterpret_cast<const Words*>(p); }

uint64_t sum_row(const uint8_t* row, int64_t bytes, const uint8_t* ahead) {
  Words a = {}, b = {}, c = {}, d = {};
  int64_t i = 0;
  for (; i + kLineBytes <= bytes; i += kLineBytes) {
    if (ahead != nullptr) __builtin_prefetch(ahead + i);
    a += at(row + i);
    b += at(row + i + 16);
    c += at(row + i + 32);
    d += at(row + i + 48);
  }
  if (i < bytes) {
    if (ahead != nullptr) __builtin_prefetch(ahead + i);
    a += at(row + i);
    b += at(row + i + 16);
  }
  a += b + c + d;
  return a[0] + a[1];
}

}  // namespace
}  // namespace qsk

int qsk_probe_read(const qsk_probe_args* args, const qsk_parallel* parallel, uint64_t* sum) {
  if (args == nullptr || sum == nullptr) return QSK_NULL_ARGUMENT;
  if (args->count < 0 || args->row_bytes < 0 || args->row_bytes % 32 != 0 || args->ahead < 0) return QSK_BAD_SIZE;
  *sum = 0;
  if (args->count == 0 || args->row_bytes == 0) return QSK_OK;
  if (args->base == nullptr || args->index == nullptr) return QSK_NULL_ARGUMENT;
  const int64_t piece_rows = qsk::ceil_div(qsk::kPieceBytes, args->row_bytes);
  qsk::Pieces pieces(qsk::ceil_div(args->count, piece_rows));
  std::atomic<uint64_t> total{0};
  auto body = [&](int64_t) {
    uint64_t own = 0;
    for (int64_t piece = pieces.take(); piece >= 0; piece = pieces.take()) {
      const int64_t end = qsk::min_of(args->count, (piece + 1) * piece_rows);
      for (int64_t i = piece * piece_rows; i < end; ++i) {
        const int64_t next = i + args->ahead;
        const uint8_t* ahead =
            args->ahead > 0 && next < args->count ? args->base + args->index[next] * args->row_bytes : nullptr;
        own += qsk::sum_row(args->base + args->index[i] * args->row_bytes, args->row_bytes, ahead);
      }
    }
    total.fetch_add(own, std::memory_order_relaxed);
  };
  qsk::run_workers(parallel, qsk::worker_count(parallel), body);
  *sum = total.load(std::memory_order_relaxed);
  return QSK_OK;
}
