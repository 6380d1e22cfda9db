#include "qsk/probe.h"

#include <string.h>

#include <atomic>

#include "work.h"

namespace qsk {
namespace {

constexpr int64_t kLineBytes = 64;
constexpr int64_t kPieceBytes = 64 << 10;

uint64_t sum_row(const uint8_t* row, int64_t bytes, const uint8_t* ahead) {
  constexpr int64_t kWords = 4;
  uint64_t sums[kWords] = {};
  for (int64_t at = 0; at < bytes; at += kWords * 8) {
    if (ahead != nullptr && at % kLineBytes == 0) __builtin_prefetch(ahead + at);
    uint64_t words[kWords];
    memcpy(words, row + at, sizeof words);
    for (int64_t i = 0; i < kWords; ++i) sums[i] += words[i];
  }
  return sums[0] + sums[1] + sums[2] + sums[3];
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
