// Sharing work among the tasks of one call: each takes the next piece until none is left.
#ifndef QSK_SRC_WORK_H_
#define QSK_SRC_WORK_H_

#include <stdint.h>

#include <atomic>

#include "qsk/parallel.h"

namespace qsk {

class Pieces {
 public:
  explicit Pieces(int64_t count) : count_(count) {}
  // The next piece, or -1 when none is left.
  int64_t take() {
    const int64_t piece = next_.fetch_add(1, std::memory_order_relaxed);
    return piece < count_ ? piece : -1;
  }

 private:
  std::atomic<int64_t> next_{0};
  const int64_t count_;
};

inline int64_t worker_count(const qsk_parallel* parallel) {
  return parallel != nullptr && parallel->run != nullptr && parallel->workers > 1 ? parallel->workers : 1;
}

// Calls body(worker) for worker 0..workers-1, workers at most worker_count(parallel).
template <typename Body>
void run_workers(const qsk_parallel* parallel, int64_t workers, Body& body) {
  if (workers <= 1) {
    body(0);
    return;
  }
  parallel->run(
      parallel->context, [](void* argument, int64_t index) { (*static_cast<Body*>(argument))(index); }, &body, workers);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

// Hands out aligned pieces of the caller's scratch. With a null base it only counts.
class Scratch {
 public:
  explicit Scratch(void* base) : base_(static_cast<uint8_t*>(base)) {}
  template <typename T>
  T* take(int64_t count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  uint8_t* base_;
  int64_t used_ = 0;
};

}  // namespace qsk

#endif  // QSK_SRC_WORK_H_
