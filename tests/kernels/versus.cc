// Times versions of the kernels call by call in turns, in one process and on the same data: where other programs and
// other machines use the cores and the memory too, nothing else tells two versions that differ by a tenth apart.
//
//   qsk_versus OP M K N DENSITY THREADS ROUNDS LIBRARY...
//
// OP is ternary (SparseTernaryMatMul), int4 or int8 (SparseMatMulNBits), head4 or head8 (DenseMatMulNBits); groups
// of 32. A LIBRARY is any libqsparse_ort.so, of a build or of a bundle. Every call takes the next of 256 MB of weights;
// each round calls all libraries in a new order. Threads spin between calls. Printed are the least time, the median and
// the first library's median over this one's.
#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "qsk/dense_matmul_nbits.h"
#include "qsk/sparse_matmul.h"
#include "qsk/sparse_ternary_matmul.h"
#include "timing.h"

namespace {

constexpr int64_t kGroup = 32;
constexpr int64_t kColdBytes = 256 << 20;
constexpr uint16_t kScale = 0x2000;  // a float16

// Threads that spin between tasks; the caller is one of them.
class Pool {
 public:
  explicit Pool(int64_t threads) {
    for (int64_t i = 1; i < threads; ++i) {
      threads_.emplace_back([this] {
        while (!is_over_) take();
      });
    }
  }
  ~Pool() {
    is_over_ = true;
    for (std::thread& thread : threads_) thread.join();
  }
  static void run(void* context, void (*task)(void*, int64_t), void* argument, int64_t count) {
    Pool& pool = *static_cast<Pool*>(context);
    pool.task_ = task;
    pool.argument_ = argument;
    pool.left_ = count;
    pool.tickets_ = (++pool.round_ << 32) + count;
    pool.take();
    while (pool.left_ > 0) std::this_thread::yield();
  }

 private:
  void take() {
    uint64_t seen = tickets_;
    for (uint64_t next = seen >> 16 & 0xffff; next < (seen & 0xffff); next = seen >> 16 & 0xffff) {
      if (!tickets_.compare_exchange_weak(seen, seen + (1 << 16))) continue;
      task_(argument_, static_cast<int64_t>(next));
      --left_;
      seen = tickets_;
    }
  }

  std::vector<std::thread> threads_;
  std::atomic<uint64_t> tickets_{0};  // the round, the next task and their number, so that none is taken twice
  uint64_t round_ = 0;
  std::atomic<int64_t> left_{0};
  std::atomic<bool> is_over_{false};
  void (*task_)(void*, int64_t) = nullptr;
  void* argument_ = nullptr;
};

struct Problem {
  std::string op;
  int64_t m, k, n, kept;

  bool is_ternary() const { return op == "ternary"; }
  bool is_head() const { return op == "head4" || op == "head8"; }
  int64_t bits() const { return is_ternary() ? 2 : op.back() - '0'; }
};

// One library: its functions, and a call of the op that reads weights at `w` and scales at `scales`.
class Version {
 public:
  Version(const char* path, const Problem& problem, const float* x, float* y, const qsk_parallel& parallel)
      : path_(path), library_(dlopen(path, RTLD_NOW | RTLD_LOCAL)), problem_(problem), parallel_(parallel) {
    if (library_ == nullptr) fail(dlerror());
    const qsk_variant* variant = nullptr;
    if (find<decltype(qsk_variant_choose)>("qsk_variant_choose")(&variant) != QSK_OK) fail("no variant runs here");
    if (problem.is_ternary()) {
      ternary_ = {};
      ternary_.type = QSK_FLOAT32;
      ternary_.x = x;
      ternary_.y = y;
      ternary_.scales = &unit_;
      ternary_.n = &problem_.n;
      ternary_.matrices = 1;
      ternary_.m = problem.m;
      ternary_.k = problem.k;
      ternary_.top_k = problem.kept;
      prepare("qsk_sparse_ternary_matmul", variant, ternary_,
              [this](const uint8_t* w, const uint16_t*) { ternary_.w = w; });
    } else if (problem.is_head()) {
      head_ = {};
      head_.type = QSK_FLOAT32;
      head_.x = x;
      head_.y = y;
      head_.m = problem.m;
      head_.k = problem.k;
      head_.n = problem.n;
      head_.bits = problem.bits();
      head_.group = kGroup;
      prepare("qsk_dense_matmul_nbits", variant, head_, [this](const uint8_t* w, const uint16_t* scales) {
        head_.w = w;
        head_.scales = scales;
      });
    } else {
      sparse_ = {};
      sparse_.type = QSK_FLOAT32;
      sparse_.weight_type = problem.bits() == 4 ? QSK_INT4 : QSK_INT8;
      sparse_.x = x;
      sparse_.y = y;
      sparse_.n = &problem_.n;
      sparse_.matrices = 1;
      sparse_.m = problem.m;
      sparse_.k = problem.k;
      sparse_.top_k = problem.kept;
      sparse_.group = kGroup;
      prepare("qsk_sparse_matmul", variant, sparse_, [this](const uint8_t* w, const uint16_t* scales) {
        sparse_.w = w;
        sparse_.scales = scales;
      });
    }
  }
  Version(const Version&) = delete;
  Version& operator=(const Version&) = delete;

  void time(const uint8_t* w, const uint16_t* scales) {
    const auto start = std::chrono::steady_clock::now();
    if (call_(w, scales) != QSK_OK) fail("the kernel refused its arguments");
    us_.push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count());
  }
  double median() {
    std::sort(us_.begin(), us_.end());
    return us_[us_.size() / 2];
  }
  void print(double first) {
    const double own = median();
    printf("%-40s min %9.2f us  median %9.2f us  %6.3fx\n", path_.c_str(), us_.front(), own, first / own);
  }

 private:
  template <typename Function>
  Function* find(const std::string& name) {
    void* const found = dlsym(library_, name.c_str());
    if (found == nullptr) fail(("no " + name + " in " + path_).c_str());
    return reinterpret_cast<Function*>(found);
  }
  template <typename Args, typename Point>
  void prepare(const std::string& name, const qsk_variant* variant, Args& args, Point point) {
    using Compute = int(const qsk_variant*, const Args*, const qsk_parallel*, void*, int64_t);
    using Count = int64_t(const Args*, const qsk_parallel*);
    Compute* const compute = find<Compute>(name);
    const int64_t bytes = find<Count>(name + "_scratch_bytes")(&args, &parallel_);
    scratch_ = std::make_unique<Bytes>(bytes);
    call_ = [=, &args](const uint8_t* w, const uint16_t* scales) {
      point(w, scales);
      return compute(variant, &args, &parallel_, scratch_->as<void>(), bytes);
    };
  }

  const std::string path_;
  void* const library_;
  const Problem problem_;
  const qsk_parallel& parallel_;
  const float unit_ = 1.0f;
  qsk_sparse_ternary_matmul_args ternary_;
  qsk_sparse_matmul_args sparse_;
  qsk_dense_matmul_nbits_args head_;
  std::unique_ptr<Bytes> scratch_;
  std::function<int(const uint8_t*, const uint16_t*)> call_;
  std::vector<double> us_;
};

int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

}  // namespace

int main(int argc, char** argv) {
  if (argc < 9) fail("usage: qsk_versus OP M K N DENSITY THREADS ROUNDS LIBRARY...");
  Problem problem = {argv[1], atoll(argv[2]), atoll(argv[3]), atoll(argv[4]), 0};
  const std::vector<std::string> ops = {"ternary", "int4", "int8", "head4", "head8"};
  if (std::find(ops.begin(), ops.end(), problem.op) == ops.end()) fail("OP: ternary, int4, int8, head4, head8");
  problem.kept = static_cast<int64_t>(atof(argv[5]) * static_cast<double>(problem.k));
  const int64_t threads = atoll(argv[6]), rounds = atoll(argv[7]);
  const bool is_small = problem.m < 1 || problem.k < 1 || problem.n < 1 || threads < 1 || rounds < 1;
  if (is_small || problem.kept < 0 || problem.kept > problem.k) fail("a bad number");

  const int64_t columns = problem.is_ternary() ? round_up(problem.n, 128) : round_up(problem.n, 64);
  const int64_t weight_bytes = round_up(problem.k, 64) * columns * problem.bits() / 8;
  const int64_t scale_bytes = problem.is_ternary() ? 0 : round_up(problem.k, kGroup) / kGroup * columns * 2;
  const int64_t stride = round_up(weight_bytes + scale_bytes, 64);
  const int64_t copies = std::max<int64_t>(2, kColdBytes / stride);
  const Bytes weights(copies * stride), x(problem.m * problem.k * 4), y(problem.m * problem.n * 4);
  std::mt19937_64 random(1);
  for (int64_t i = 0; i < copies * stride; i += 8) {
    uint64_t word = random();
    if (problem.is_ternary()) word &= ~(word >> 1 & word & 0x5555555555555555u);  // code 3 becomes 2
    memcpy(weights.as<uint8_t>() + i, &word, 8);
  }
  const auto scales_of = [&](int64_t copy) {
    return reinterpret_cast<uint16_t*>(weights.as<uint8_t>() + copy * stride + weight_bytes);
  };
  for (int64_t copy = 0; copy < copies; ++copy) std::fill_n(scales_of(copy), scale_bytes / 2, kScale);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < problem.m * problem.k; ++i) x.as<float>()[i] = normal(random);

  Pool pool(threads);
  const qsk_parallel parallel = {&pool, Pool::run, threads};
  std::vector<std::unique_ptr<Version>> versions;
  for (int i = 8; i < argc; ++i) {
    versions.push_back(std::make_unique<Version>(argv[i], problem, x.as<float>(), y.as<float>(), parallel));
  }
  std::vector<size_t> order(versions.size());
  std::iota(order.begin(), order.end(), 0);
  int64_t calls = 0;
  for (int64_t round = 0; round < rounds; ++round) {
    std::shuffle(order.begin(), order.end(), random);
    for (size_t i : order) {
      const int64_t copy = calls++ % copies;
      versions[i]->time(weights.as<uint8_t>() + copy * stride, scales_of(copy));
    }
  }
  const double first = versions.front()->median();
  for (const auto& version : versions) version->print(first);
  return 0;
}
