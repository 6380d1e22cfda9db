// Runs compiled PrimFuncs without any TVM library: this program supplies the four C symbols that they call.
//
//   host LIBRARY CALLS RESULTS
//
// CALLS holds, per call: int32 length and characters of the function's name; int32 number of tensors; per tensor int32
// DLPack type code, bits, dimensions, then int64 sizes, then the elements. The last tensor is the result: what it holds
// after the call is appended to RESULTS.
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <string>
#include <thread>
#include <vector>

#include "tvm/ffi/c_api.h"
#include "tvm/runtime/c_backend_api.h"

namespace {

constexpr int kThreads = 2;

[[noreturn]] void fail(const std::string& message) {
  fprintf(stderr, "%s\n", message.c_str());
  exit(1);
}

void* allocate(int, int, uint64_t bytes, int, int) {
  void* memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (memory != nullptr) memset(memory, 0xa5, bytes);  // what a kernel reads, it must have written
  return memory;
}

int release(int, int, void* memory) {
  free(memory);
  return 0;
}

// Every one of the threads takes its share of a loop.
int launch(FTVMParallelLambda body, void* data, int) {
  std::vector<int> status(kThreads);
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&status, body, data, i] {
      TVMParallelGroupEnv group = {nullptr, kThreads};
      status[i] = body(i, &group, data);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (int one : status) {
    if (one != 0) return one;
  }
  return 0;
}

template <typename T>
T read(FILE* file) {
  T value;
  if (fread(&value, sizeof value, 1, file) != 1) fail("the file of calls ends in the middle of one");
  return value;
}

struct Tensor {
  std::vector<int64_t> shape;
  std::vector<uint8_t> memory;
  DLTensor tensor = {};
  size_t bytes = 0;

  explicit Tensor(FILE* file) {
    const int code = read<int32_t>(file), bits = read<int32_t>(file), dimensions = read<int32_t>(file);
    bytes = bits / 8;
    for (int i = 0; i < dimensions; ++i) {
      shape.push_back(read<int64_t>(file));
      bytes *= shape.back();
    }
    memory.resize(bytes + 64);
    uint8_t* start = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
    if (bytes != 0 && fread(start, bytes, 1, file) != 1) fail("the file of calls ends in the middle of a tensor");
    tensor.data = start;
    tensor.device = {kDLCPU, 0};
    tensor.ndim = dimensions;
    tensor.dtype = {static_cast<uint8_t>(code), static_cast<uint8_t>(bits), 1};
    tensor.shape = shape.data();
  }
};

void* symbol(void* library, const std::string& name) {
  void* found = dlsym(library, name.c_str());
  if (found == nullptr) fail("no symbol " + name);
  return found;
}

// A library has the variable only where one of its functions calls what it points to.
template <typename Function>
void supply(void* library, const char* name, Function* function) {
  if (void* found = dlsym(library, name)) *static_cast<Function**>(found) = function;
}

void call(void* library, FILE* calls, FILE* results, int32_t length) {
  std::string name(length, ' ');
  if (fread(name.data(), length, 1, calls) != 1) fail("the file of calls ends in the middle of a name");
  const int32_t count = read<int32_t>(calls);
  std::vector<Tensor> tensors;
  tensors.reserve(count);
  for (int i = 0; i < count; ++i) tensors.emplace_back(calls);
  std::vector<TVMFFIAny> arguments(count);
  for (int i = 0; i < count; ++i) {
    arguments[i].type_index = kTVMFFIDLTensorPtr;
    arguments[i].v_ptr = &tensors[i].tensor;
  }
  TVMFFIAny result = {};
  const auto function = reinterpret_cast<TVMFFISafeCallType>(symbol(library, "__tvm_ffi_" + name));
  if (function(nullptr, arguments.data(), count, &result) != 0) fail(name + " failed");
  const Tensor& y = tensors.back();
  if (y.bytes != 0 && fwrite(y.tensor.data, y.bytes, 1, results) != 1) fail("the results cannot be written");
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void TVMFFIErrorSetRaisedFromCStrParts(const char* kind,
                                                                                         const char** parts,
                                                                                         int32_t count) {
  fprintf(stderr, "%s: ", kind);
  for (int i = 0; i < count; ++i) fputs(parts[i] == nullptr ? "" : parts[i], stderr);
  fputc('\n', stderr);
}

int main(int argc, char** argv) {
  if (argc != 4) fail("usage: host LIBRARY CALLS RESULTS");
  void* library = dlopen(argv[1], RTLD_NOW);
  if (library == nullptr) fail(dlerror());
  supply(library, "__TVMBackendParallelLaunch", launch);
  supply(library, "__TVMBackendAllocWorkspace", allocate);
  supply(library, "__TVMBackendFreeWorkspace", release);
  FILE* calls = fopen(argv[2], "rb");
  FILE* results = fopen(argv[3], "wb");
  if (calls == nullptr || results == nullptr) fail("the files of calls and results cannot be opened");
  int32_t length;
  while (fread(&length, sizeof length, 1, calls) == 1) call(library, calls, results, length);
  fclose(calls);
  return fclose(results) == 0 ? 0 : 1;
}
