// What the kernels use of CUDA, on the host: a grid runs block after block, and the threads of a block are fibers that
// take turns at barriers and exchanges of a warp. One process thread; nothing here is thread-safe.
//
// It is stricter than a GPU. A failure, to be asked for after a call, is: a barrier that not all threads of a block
// reach; a warp's exchange that not all of its lanes reach, or in which they do different things; shared memory beyond
// 48 KiB; a grid or a block beyond CUDA's limits. Shared memory holds garbage when a block begins, each warp
// runs as far ahead as barriers let it, and which one runs first can be changed: a missing barrier shows as different
// results.
#ifndef QSK_TESTS_CUDA_EMULATION_H_
#define QSK_TESTS_CUDA_EMULATION_H_

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <functional>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)

struct dim3 {
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  unsigned x, y, z;
};

struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

namespace emulated {

constexpr int kWarp = 32;
constexpr int kMultiprocessors = 4;

// Runs the kernel, unless something has failed before; has_failed() tells how it went.
void run_grid(dim3 grid, dim3 threads, const std::function<void()>& kernel);
bool has_failed();
// The same in the order of a stream of the stand-in for CUDA, where that is loaded for all to see; `function` is the
// kernel's own, by which emulated_take_launched() tells it.
void launch(const void* function, dim3 grid, dim3 threads, void* stream, const std::function<void()>& kernel);
// Out of a kernel, also out of a signal that it has raised: the grid ends with this failure.
[[noreturn]] void abandon(const char* failure);
bool is_running();

struct Thread {
  int x, y, z;
};
const Thread& thread_index();
const dim3& block_index();
const dim3& block_size();
const dim3& grid_size();
int lane();

// Waits for all threads of the block, or for all lanes of the warp.  `what` names it in failures and must be the same
// for all.
void wait_for_block();
// Every lane gives 64 bytes at most and can read those of all 32, until it calls again: the bytes of lane i begin at
// result + 64 * i. In a last warp of fewer threads, those of the others are garbage.
constexpr size_t kExchangeBytes = 64;
const char* exchange(const char* what, const void* own, size_t bytes);

// What the threads of a block share, from the next grid on in place of what was said before; for kernels that declare
// variables of their own.
struct Shared {
  void* storage;
  size_t bytes;
};
void set_shared(const std::vector<Shared>& objects);

// The one object of this type that the threads of a block share.
void register_shared(void* storage, size_t bytes);
template <typename Type>
Type& shared() {
  static Type* storage = [] {
    static Type object;
    register_shared(&object, sizeof object);
    return &object;
  }();
  return *storage;
}

inline float to_float(float value) { return value; }
inline float to_float(uint16_t half) {
  _Float16 value;
  memcpy(&value, &half, sizeof value);
  return static_cast<float>(value);
}
template <typename T>
T from_float(float value);
template <>
inline float from_float<float>(float value) {
  return value;
}
template <>
inline uint16_t from_float<uint16_t>(float value) {
  const _Float16 rounded = static_cast<_Float16>(value);
  uint16_t half;
  memcpy(&half, &rounded, sizeof half);
  return half;
}

// mma.m16n8k32 for int8 and mma.m16n8k16 for float16 with float32 sums, by their definitions in the PTX ISA.
void multiply_tiles(int (&c)[4], const int (&a)[4], const int (&b)[2]);
void multiply_tiles(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

// Of the two float16 in a word.
inline uint32_t subtract_halves(uint32_t a, uint32_t b) {
  const auto half = [](uint32_t word, int i) { return to_float(static_cast<uint16_t>(word >> 16 * i)); };
  const auto difference = [&](int i) { return from_float<uint16_t>(half(a, i) - half(b, i)); };
  return difference(0) | static_cast<uint32_t>(difference(1)) << 16;
}

}  // namespace emulated

#define threadIdx (emulated::thread_index())
#define blockIdx (emulated::block_index())
#define blockDim (emulated::block_size())
#define gridDim (emulated::grid_size())

inline void __syncthreads() { emulated::wait_for_block(); }

// The lane at `source` of the lanes from `first` to first + width - 1; beyond them its own value.
template <typename T>
T emulated_shuffle(const char* what, T value, int source, int first, int width) {
  const char* all = emulated::exchange(what, &value, sizeof value);
  if (source >= first && source < first + width) memcpy(&value, all + emulated::kExchangeBytes * source, sizeof value);
  return value;
}
template <typename T>
T __shfl_sync(uint32_t, T value, int source, int width = emulated::kWarp) {
  const int first = emulated::lane() / width * width;
  return emulated_shuffle("__shfl_sync", value, first + source % width, first, width);
}
template <typename T>
T __shfl_up_sync(uint32_t, T value, int distance, int width = emulated::kWarp) {
  const int lane = emulated::lane();
  return emulated_shuffle("__shfl_up_sync", value, lane - distance, lane / width * width, width);
}
template <typename T>
T __shfl_down_sync(uint32_t, T value, int distance, int width = emulated::kWarp) {
  const int lane = emulated::lane();
  return emulated_shuffle("__shfl_down_sync", value, lane + distance, lane / width * width, width);
}
inline uint32_t __ballot_sync(uint32_t, bool predicate) {
  const char* all = emulated::exchange("__ballot_sync", &predicate, sizeof predicate);
  uint32_t ballot = 0;
  for (int lane = 0; lane < emulated::kWarp; ++lane) {
    ballot |= static_cast<uint32_t>(all[emulated::kExchangeBytes * lane] != 0) << lane;
  }
  return ballot;
}

// Threads take turns only where they wait: plain operations are atomic.
inline int atomicAdd(int* address, int value) {
  const int before = *address;
  *address += value;
  return before;
}

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline int __ffs(int value) { return __builtin_ffs(value); }

inline int emulated_dot(int a, int b, int sum) {
  for (int i = 0; i < 4; ++i) {
    sum +=
        static_cast<int8_t>(static_cast<uint32_t>(a) >> 8 * i) * static_cast<int8_t>(static_cast<uint32_t>(b) >> 8 * i);
  }
  return sum;
}
inline int __dp4a(int a, int b, int sum) { return emulated_dot(a, b, sum); }

inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}

#endif  // QSK_TESTS_CUDA_EMULATION_H_
