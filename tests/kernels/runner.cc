// Reads kernel cases from a file and writes their results to another; conftest.py is the other side.
//
//   qsk_runner CASES RESULTS     runs all cases with the variant that QSPARSE_VARIANT or the machine chooses
//   qsk_runner --variants        prints "chosen <name>" and "supported <name>..." or an error
//
// A case is an int64 op, its int64 parameters and its arrays; a result is the int64 status, then the output arrays.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <thread>
#include <vector>

#include "qsk/quantize_rows.h"
#include "qsk/sparse_ternary_matmul.h"
#include "qsk/ternary_matmul.h"
#include "qsk/topk_sparsify.h"

namespace {

enum { kTopK = 0, kQuantize = 1, kTernary = 2, kSparse = 3 };

void run_threads(void*, void (*task)(void*, int64_t), void* argument, int64_t count) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < count; ++i) threads.emplace_back(task, argument, i);
  for (std::thread& thread : threads) thread.join();
}

// Exactly as large as asked for, so that a sanitizer sees every byte beyond.
class Memory {
 public:
  explicit Memory(int64_t bytes) : base_(bytes > 0 ? aligned_alloc(64, (bytes + 63) / 64 * 64) : nullptr) {}
  ~Memory() { free(base_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void* get() const { return base_; }

 private:
  void* base_;
};

class Stream {
 public:
  Stream(const char* in, const char* out) : in_(fopen(in, "rb")), out_(fopen(out, "wb")) {
    if (in_ == nullptr || out_ == nullptr) fail("cannot open the files");
  }
  ~Stream() {
    fclose(in_);
    if (fclose(out_) != 0) fail("cannot write the results");
  }
  bool next(int64_t* value) { return fread(value, sizeof *value, 1, in_) == 1; }
  int64_t number() {
    int64_t value = 0;
    if (!next(&value)) fail("a case is cut short");
    return value;
  }
  std::vector<uint8_t> bytes(int64_t count) {
    std::vector<uint8_t> data(count);
    if (count > 0 && fread(data.data(), 1, count, in_) != static_cast<size_t>(count)) fail("a case is cut short");
    return data;
  }
  void write(int64_t value) { write(&value, sizeof value); }
  void write(const void* data, int64_t count) {
    if (count > 0 && fwrite(data, 1, count, out_) != static_cast<size_t>(count)) fail("cannot write the results");
  }

 private:
  [[noreturn]] static void fail(const char* message) {
    fprintf(stderr, "qsk_runner: %s\n", message);
    exit(2);
  }
  FILE* in_;
  FILE* out_;
};

int64_t element_bytes(int64_t type) { return type == QSK_FLOAT16 ? 2 : 4; }

void run_topk(Stream& stream) {
  qsk_topk_sparsify_args args = {};
  args.type = static_cast<int>(stream.number());
  args.rows = stream.number();
  args.width = stream.number();
  args.k = stream.number();
  args.block = stream.number();
  args.rescale_l2 = static_cast<int>(stream.number());
  const qsk_parallel parallel = {nullptr, run_threads, stream.number()};
  const int64_t bytes = args.rows * args.width * element_bytes(args.type);
  const std::vector<uint8_t> x = stream.bytes(bytes);
  std::vector<uint8_t> y(bytes);
  args.x = x.data();
  args.y = y.data();
  const int64_t scratch_bytes = qsk_topk_sparsify_scratch_bytes(&args, &parallel);
  const Memory scratch(scratch_bytes);
  const int status = qsk_topk_sparsify(nullptr, &args, &parallel, scratch.get(), scratch_bytes);
  stream.write(status);
  if (status == QSK_OK) stream.write(y.data(), bytes);
}

void run_quantize(Stream& stream) {
  const int64_t rows = stream.number(), width = stream.number();
  const std::vector<uint8_t> x = stream.bytes(rows * width * 4);
  std::vector<int8_t> q(rows * width);
  std::vector<float> gamma(rows);
  const int status =
      qsk_quantize_rows(nullptr, reinterpret_cast<const float*>(x.data()), rows, width, q.data(), gamma.data());
  stream.write(status);
  if (status != QSK_OK) return;
  stream.write(q.data(), rows * width);
  stream.write(gamma.data(), rows * 4);
}

void run_ternary(Stream& stream) {
  qsk_ternary_matmul_args args = {};
  args.type = static_cast<int>(stream.number());
  args.m = stream.number();
  args.k = stream.number();
  args.n = stream.number();
  const qsk_parallel parallel = {nullptr, run_threads, stream.number()};
  const std::vector<uint8_t> scale = stream.bytes(4);
  memcpy(&args.scale, scale.data(), sizeof args.scale);
  const std::vector<uint8_t> x = stream.bytes(args.m * args.k * element_bytes(args.type));
  const std::vector<uint8_t> w = stream.bytes(args.k * qsk_ternary_row_bytes(args.n));
  std::vector<uint8_t> y(args.m * args.n * element_bytes(args.type));
  args.x = x.data();
  args.w = w.data();
  args.y = y.data();
  const int64_t scratch_bytes = qsk_ternary_matmul_scratch_bytes(&args, &parallel);
  const Memory scratch(scratch_bytes);
  const int status = qsk_ternary_matmul(nullptr, &args, &parallel, scratch.get(), scratch_bytes);
  stream.write(status);
  if (status == QSK_OK) stream.write(y.data(), static_cast<int64_t>(y.size()));
}

void run_sparse(Stream& stream) {
  qsk_sparse_ternary_matmul_args args = {};
  args.type = static_cast<int>(stream.number());
  args.m = stream.number();
  args.k = stream.number();
  args.top_k = stream.number();
  args.block = stream.number();
  const qsk_parallel parallel = {nullptr, run_threads, stream.number()};
  args.matrices = stream.number();
  std::vector<int64_t> n(args.matrices);
  int64_t outputs = 0, row_bytes = 0;
  for (int64_t& one : n) {
    one = stream.number();
    outputs += one;
    row_bytes += qsk_ternary_row_bytes(one);
  }
  std::vector<float> scales(args.matrices);
  const std::vector<uint8_t> raw_scales = stream.bytes(args.matrices * 4);
  if (!raw_scales.empty()) memcpy(scales.data(), raw_scales.data(), raw_scales.size());
  const std::vector<uint8_t> x = stream.bytes(args.m * args.k * element_bytes(args.type));
  const std::vector<uint8_t> w = stream.bytes(args.k * row_bytes);
  std::vector<uint8_t> y(args.m * outputs * element_bytes(args.type));
  args.n = n.data();
  args.scales = scales.data();
  args.x = x.data();
  args.w = w.data();
  args.y = y.data();
  const int64_t scratch_bytes = qsk_sparse_ternary_matmul_scratch_bytes(&args, &parallel);
  const Memory scratch(scratch_bytes);
  const int status = qsk_sparse_ternary_matmul(nullptr, &args, &parallel, scratch.get(), scratch_bytes);
  stream.write(status);
  if (status == QSK_OK) stream.write(y.data(), static_cast<int64_t>(y.size()));
}

int print_variants() {
  const qsk_variant* chosen = nullptr;
  const int status = qsk_variant_choose(&chosen);
  if (status != QSK_OK) {
    char message[1024];
    qsk_variant_explain(status, message, sizeof message);
    fprintf(stderr, "%s\n", message);
    return 1;
  }
  printf("chosen %s\nsupported", qsk_variant_name(chosen));
  for (int64_t i = 0; i < qsk_variant_count(); ++i) {
    const qsk_variant* variant = qsk_variant_at(i);
    if (qsk_variant_is_supported(variant)) printf(" %s", qsk_variant_name(variant));
  }
  printf("\n");
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && strcmp(argv[1], "--variants") == 0) return print_variants();
  if (argc != 3) {
    fprintf(stderr, "usage: qsk_runner CASES RESULTS | --variants\n");
    return 2;
  }
  Stream stream(argv[1], argv[2]);
  int64_t op;
  while (stream.next(&op)) {
    if (op == kTopK) {
      run_topk(stream);
    } else if (op == kQuantize) {
      run_quantize(stream);
    } else if (op == kSparse) {
      run_sparse(stream);
    } else {
      run_ternary(stream);
    }
  }
  return 0;
}
