// Times SparseTernaryMatMul without ONNX Runtime around it, beside its own selection and quantiser.
//
//   qsk_stopwatch PARTS M K N DENSITY THREADS CALLS [COPIES]
//
// PARTS is a list of
//   whole     selection, quantiser and product, on rows of normally distributed floats of which DENSITY is kept
//   natural   the same without a selection: what is not active is zero in x already
//   select    selection, quantiser and the list of active channels alone, for one row (M times over)
//   quantise  the same without a selection
//   wake      an empty task on every thread: what asking them costs
// Every call of a part takes the next of COPIES weight matrices (1: weights stay in the cache). The parts take turns,
// CALLS times; printed are the least and the median of each in microseconds, the median's share of the first part, and
// on Linux, where the counter may be read, the least cycles of the calling thread and the products per cycle: figures
// that neither the clock nor, much, other processes change.
// With one part and one copy it is also a subject for counters: perf stat, valgrind --tool=callgrind, qemu's plugins.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__linux__)
#include <linux/perf_event.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "kernels.h"
#include "qsk/sparse_ternary_matmul.h"
#include "quantized_row.h"
#include "timing.h"

namespace {

// Threads that sleep between tasks; the caller is one of them.
class Pool {
 public:
  explicit Pool(int64_t threads) {
    for (int64_t i = 1; i < threads; ++i) threads_.emplace_back([this] { work(); });
  }
  ~Pool() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      is_over_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }
  static void run(void* context, void (*task)(void*, int64_t), void* argument, int64_t count) {
    Pool& pool = *static_cast<Pool*>(context);
    std::unique_lock<std::mutex> lock(pool.mutex_);
    pool.task_ = task;
    pool.argument_ = argument;
    pool.next_ = 0;
    pool.count_ = pool.left_ = count;
    pool.wake_.notify_all();
    pool.take(lock);
    pool.done_.wait(lock, [&] { return pool.left_ == 0; });
  }

 private:
  void take(std::unique_lock<std::mutex>& lock) {
    while (next_ < count_) {
      const int64_t index = next_++;
      lock.unlock();
      task_(argument_, index);
      lock.lock();
      if (--left_ == 0) done_.notify_one();
    }
  }
  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (!is_over_) {
      take(lock);
      wake_.wait(lock, [&] { return is_over_ || next_ < count_; });
    }
  }

  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  bool is_over_ = false;
  void (*task_)(void*, int64_t) = nullptr;
  void* argument_ = nullptr;
  int64_t next_ = 0, count_ = 0, left_ = 0;
};

// This thread's cycles in user mode.
class Cycles {
 public:
#if defined(__linux__)
  Cycles() {
    perf_event_attr attributes = {};
    attributes.type = PERF_TYPE_HARDWARE;
    attributes.size = sizeof attributes;
    attributes.config = PERF_COUNT_HW_CPU_CYCLES;
    attributes.exclude_kernel = 1;
    attributes.exclude_hv = 1;
    file_ = static_cast<int>(syscall(SYS_perf_event_open, &attributes, 0, -1, -1, 0));
  }
  int64_t read() const {
    int64_t count = 0;
    return file_ >= 0 && ::read(file_, &count, sizeof count) == sizeof count ? count : 0;
  }

 private:
  int file_;
#else
  int64_t read() const { return 0; }
#endif
};

struct Part {
  std::string name;
  std::function<void(int64_t call)> run;
  std::vector<double> us;
  int64_t least_cycles = INT64_MAX;
};

// Random ternary codes: every byte's code 3 made 2.
void fill(uint8_t* w, int64_t bytes) {
  std::mt19937_64 random(1);
  for (int64_t i = 0; i < bytes; i += 8) {
    uint64_t word = random();
    word &= ~(word >> 1 & word & 0x5555555555555555u);
    memcpy(w + i, &word, 8);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 8 && argc != 9) fail("usage: qsk_stopwatch PARTS M K N DENSITY THREADS CALLS [COPIES]");
  const int64_t m = atoll(argv[2]), k = atoll(argv[3]), n = atoll(argv[4]), threads = atoll(argv[6]);
  const int64_t calls = atoll(argv[7]), copies = argc == 9 ? atoll(argv[8]) : 1;
  const int64_t kept = static_cast<int64_t>(atof(argv[5]) * static_cast<double>(k));
  if (m < 1 || k < 1 || n < 1 || kept < 0 || kept > k || threads < 1 || calls < 1 || copies < 1) fail("a bad number");
  const qsk_variant* variant = nullptr;
  if (qsk_variant_choose(&variant) != QSK_OK) fail("QSPARSE_VARIANT names no variant of this machine");

  const int64_t matrix_bytes = k * qsk_ternary_row_bytes(n);
  const Bytes w(copies * matrix_bytes), x(m * k * 4), sparse_x(m * k * 4), y(m * n * 4);
  fill(w.as<uint8_t>(), copies * matrix_bytes);
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < m * k; ++i) x.as<float>()[i] = normal(random);
  const qsk::Selection selection = {kept, 0, false};
  const Bytes row_scratch(qsk::quantize_selected_bytes(selection, k) + qsk::select_bytes(selection, k));
  for (int64_t row = 0; row < m; ++row) {
    qsk::sparsify_row(*variant->topk, selection, x.as<float>() + row * k, k, row_scratch.as<void>(),
                      sparse_x.as<float>() + row * k);
  }

  Pool pool(threads);
  const qsk_parallel parallel = {&pool, Pool::run, threads};
  const float scale = 0.01f;
  qsk_sparse_ternary_matmul_args args = {};
  args.type = QSK_FLOAT32;
  args.scales = &scale;
  args.n = &n;
  args.matrices = 1;
  args.y = y.as<void>();
  args.m = m;
  args.k = k;
  const int64_t scratch_bytes = [&] {
    args.top_k = kept;
    return qsk_sparse_ternary_matmul_scratch_bytes(&args, &parallel);
  }();
  const Bytes scratch(scratch_bytes);
  auto product = [&](int64_t call, const Bytes& rows, int64_t top_k) {
    args.x = rows.as<void>();
    args.top_k = top_k;
    args.w = w.as<uint8_t>() + call % copies * matrix_bytes;
    if (qsk_sparse_ternary_matmul(variant, &args, &parallel, scratch.as<void>(), scratch_bytes) != QSK_OK)
      fail("failed");
  };
  const Bytes q(k + 64), index((k + 64) * 4), value(k + 64);
  auto quantise = [&](bool selects) {
    const qsk::QuantizeKernels& kernels = *variant->quantize;
    for (int64_t row = 0; row < m; ++row) {
      int32_t least = 1;
      if (selects) {
        const float* from = x.as<float>() + row * k;
        void* memory = row_scratch.as<void>();
        least = qsk::quantize_selected_row(kernels, *variant->topk, selection, from, k, memory, q.as<int8_t>()).least;
      } else {
        qsk::quantize_row(kernels, sparse_x.as<float>() + row * k, k, q.as<int8_t>());
      }
      kernels.compact(q.as<int8_t>(), k, least, index.as<int32_t>(), value.as<int8_t>());
    }
  };

  std::vector<Part> parts;
  const std::string list = std::string(argv[1]) + ",";
  for (size_t begin = 0, end; (end = list.find(',', begin)) != std::string::npos; begin = end + 1) {
    const std::string name = list.substr(begin, end - begin);
    if (name == "whole") {
      parts.push_back({name, [&](int64_t call) { product(call, x, kept); }, {}, INT64_MAX});
    } else if (name == "natural") {
      parts.push_back({name, [&](int64_t call) { product(call, sparse_x, k); }, {}, INT64_MAX});
    } else if (name == "select") {
      parts.push_back({name, [&](int64_t) { quantise(true); }, {}, INT64_MAX});
    } else if (name == "quantise") {
      parts.push_back({name, [&](int64_t) { quantise(false); }, {}, INT64_MAX});
    } else if (name == "wake") {
      parts.push_back(
          {name, [&](int64_t) { Pool::run(&pool, [](void*, int64_t) {}, nullptr, threads); }, {}, INT64_MAX});
    } else {
      fail("PARTS: whole, natural, select, quantise, wake");
    }
  }
  const Cycles cycles;
  for (int64_t call = 0; call < calls; ++call) {
    for (Part& part : parts) {
      const int64_t before = cycles.read();
      const auto start = std::chrono::steady_clock::now();
      part.run(call);
      part.us.push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count());
      part.least_cycles = std::min(part.least_cycles, cycles.read() - before);
    }
  }
  double first = 0;
  for (Part& part : parts) {
    std::sort(part.us.begin(), part.us.end());
    const double median = part.us[part.us.size() / 2], products = static_cast<double>(m * k * n);
    if (first == 0) first = median;
    printf("%-8s min %9.2f us  median %9.2f us  %6.1f %%  %6.1f GOPS at the least", part.name.c_str(), part.us.front(),
           median, 100 * median / first, 2e-3 * products / part.us.front());
    if (threads == 1 && part.least_cycles > 0) {
      printf("  %9lld cycles %6.1f products/cycle", static_cast<long long>(part.least_cycles),
             products / static_cast<double>(part.least_cycles));
    }
    printf("\n");
  }
  return 0;
}
