// Reads kernel calls from a file and writes their results to another; kernel_runs.py is the other side.
//
//   qsk_runner CALLS RESULTS     makes all calls with the variant that QSPARSE_VARIANT or the machine chooses
//   qsk_runner --variants        prints "chosen <name>" and "supported <name>..." or an error
//
// Every op has the same form, so a call is: the op's name, the bytes of its argument struct, the workers, the arrays
// that the struct's pointers point to (offset in the struct, content) and those that it writes to (offset, size). A
// result is the status, the threads used, and the written arrays. A new op is one line in kOps.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <string>
#include <thread>
#include <vector>

#include "qsk/add_rms_norm.h"
#include "qsk/cached_attention.h"
#include "qsk/dense_matmul_nbits.h"
#include "qsk/gated_activation.h"
#include "qsk/quantize_rows.h"
#include "qsk/sparse_matmul.h"
#include "qsk/sparse_ternary_matmul.h"
#include "qsk/ternary_matmul.h"
#include "qsk/topk_sparsify.h"

namespace {

struct Op {
  const char* name;
  size_t args_bytes;
  int64_t (*scratch_bytes)(const void* args, const qsk_parallel* parallel);
  int (*run)(const void* args, const qsk_parallel* parallel, void* scratch, int64_t scratch_bytes);
};

template <typename Args, int64_t (*kScratchBytes)(const Args*, const qsk_parallel*),
          int (*kRun)(const qsk_variant*, const Args*, const qsk_parallel*, void*, int64_t)>
constexpr Op op(const char* name) {
  return {name, sizeof(Args),
          [](const void* args, const qsk_parallel* parallel) {
            return kScratchBytes(static_cast<const Args*>(args), parallel);
          },
          [](const void* args, const qsk_parallel* parallel, void* scratch, int64_t scratch_bytes) {
            return kRun(nullptr, static_cast<const Args*>(args), parallel, scratch, scratch_bytes);
          }};
}

#define OP(name) op<name##_args, name##_scratch_bytes, name>(#name)

constexpr Op kOps[] = {
    OP(qsk_topk_sparsify),    OP(qsk_quantize_rows),      OP(qsk_ternary_matmul), OP(qsk_sparse_ternary_matmul),
    OP(qsk_sparse_matmul),    OP(qsk_dense_matmul_nbits), OP(qsk_gather_nbits),   OP(qsk_cached_attention),
    OP(qsk_gated_activation), OP(qsk_add_rms_norm),
};

[[noreturn]] void fail(const std::string& message) {
  fprintf(stderr, "qsk_runner: %s\n", message.c_str());
  exit(2);
}

const Op& op_by_name(const std::string& name) {
  for (const Op& op : kOps) {
    if (name == op.name) return op;
  }
  fail("runner.cc has no line for the op " + name);
}

// `context` is an int64_t that gets the number of threads.
void run_threads(void* context, void (*task)(void*, int64_t), void* argument, int64_t count) {
  int64_t& most = *static_cast<int64_t*>(context);
  if (count > most) most = count;
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < count; ++i) threads.emplace_back(task, argument, i);
  for (std::thread& thread : threads) thread.join();
}

#if defined(__SANITIZE_ADDRESS__)
// Exactly as large as asked for, so that the sanitizer sees every byte around it.
struct Allocation {
  Allocation(int64_t bytes, int64_t alignment) {
    if (posix_memalign(&base, alignment < 16 ? 16 : alignment, bytes) != 0) fail("out of memory");
  }
  void release() { free(base); }
  void* base = nullptr;
};
#else
// Ends where a page begins that nobody may touch, so that a read or write beyond it stops the program also where no
// sanitizer runs, as under an emulator. `alignment` moves the end down to its next multiple.
struct Allocation {
  Allocation(int64_t bytes, int64_t alignment) {
    const int64_t page = sysconf(_SC_PAGESIZE), used = (bytes + alignment - 1) / alignment * alignment;
    mapped_bytes = (used + page - 1) / page * page + page;
    mapped = mmap(nullptr, mapped_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) fail("out of memory");
    uint8_t* const last_page = static_cast<uint8_t*>(mapped) + mapped_bytes - page;
    if (mprotect(last_page, page, PROT_NONE) != 0) fail("cannot protect a page");
    base = last_page - used;
  }
  void release() { munmap(mapped, mapped_bytes); }
  void* mapped;
  int64_t mapped_bytes;
  void* base;
};
#endif

class Memory {
 public:
  explicit Memory(int64_t bytes, int64_t alignment = 1) : allocation_(bytes, alignment), bytes_(bytes) {
    memset(get(), 0xa5, bytes);
  }
  Memory(Memory&& other) noexcept : allocation_(other.allocation_), bytes_(other.bytes_), owns_(other.owns_) {
    other.owns_ = false;
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() {
    if (owns_) allocation_.release();
  }
  void* get() const { return allocation_.base; }
  int64_t bytes() const { return bytes_; }

 private:
  Allocation allocation_;
  int64_t bytes_;
  bool owns_ = true;
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
    if (!next(&value)) fail("a call is cut short");
    return value;
  }
  Memory array() { return array(number()); }
  Memory array(int64_t bytes) {
    Memory memory(bytes);
    if (memory.bytes() > 0 && fread(memory.get(), memory.bytes(), 1, in_) != 1) fail("a call is cut short");
    return memory;
  }
  void write(const void* content, int64_t bytes) {
    if (bytes > 0 && fwrite(content, bytes, 1, out_) != 1) fail("cannot write the results");
  }
  void write(int64_t value) { write(&value, sizeof value); }

 private:
  FILE* in_;
  FILE* out_;
};

void set_pointer(const Memory& args, int64_t offset, void* to) {
  memcpy(static_cast<uint8_t*>(args.get()) + offset, &to, sizeof to);
}

void run_call(const std::string& name, Stream& stream) {
  const Op& op = op_by_name(name);
  const Memory args = stream.array();
  if (args.bytes() != static_cast<int64_t>(op.args_bytes)) {
    fail(name + "_args has " + std::to_string(op.args_bytes) + " bytes, not " + std::to_string(args.bytes()));
  }
  int64_t threads = 1;
  const qsk_parallel parallel = {&threads, run_threads, stream.number()};
  std::vector<Memory> inputs, outputs;
  for (int64_t left = stream.number(); left > 0; --left) {
    const int64_t offset = stream.number();
    inputs.push_back(stream.array());
    set_pointer(args, offset, inputs.back().get());
  }
  for (int64_t left = stream.number(); left > 0; --left) {
    const int64_t offset = stream.number();
    outputs.emplace_back(stream.number());
    set_pointer(args, offset, outputs.back().get());
  }
  const Memory scratch(op.scratch_bytes(args.get(), &parallel), 64);
  stream.write(op.run(args.get(), &parallel, scratch.get(), scratch.bytes()));
  stream.write(threads);
  for (const Memory& output : outputs) stream.write(output.get(), output.bytes());
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
    fprintf(stderr, "usage: qsk_runner CALLS RESULTS | --variants\n");
    return 2;
  }
  Stream stream(argv[1], argv[2]);
  int64_t length;
  while (stream.next(&length)) {
    const Memory name = stream.array(length);
    run_call(std::string(static_cast<const char*>(name.get()), name.bytes()), stream);
  }
  return 0;
}
