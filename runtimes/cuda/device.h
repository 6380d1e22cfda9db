// The dialect that the kernels are written in: CUDA for nvcc, its emulation on the host for any other compiler.
//
// Kernels use only what both have: threadIdx.x, blockIdx, gridDim, QSK_SHARED, __syncthreads, the full-warp forms of
// __shfl_*_sync and __ballot_sync, atomicAdd, and the functions below. A row's type is float, or uint16_t for float16.
#ifndef QSK_CUDA_DEVICE_H_
#define QSK_CUDA_DEVICE_H_

#include <stdint.h>

#include "qsk_cuda.h"

#ifdef __CUDACC__
#include <cuda_fp16.h>
// A kernel's shared memory: one struct, named once.
#define QSK_SHARED(Type, name) __shared__ Type name
#else
#include "emulation.h"
#define QSK_SHARED(Type, name) Type& name = emulated::shared<Type>()
#endif

namespace qsk_cuda {

constexpr int kThreads = 256;  // of every block, always in one dimension
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;
constexpr uint32_t kAllLanes = 0xffffffffu;

inline __device__ int lane_of_thread() { return threadIdx.x % kWarp; }
inline __device__ int warp_of_thread() { return threadIdx.x / kWarp; }

#ifdef __CUDACC__

inline __device__ float to_float(float value) { return value; }
inline __device__ float to_float(uint16_t half) { return __half2float(__ushort_as_half(half)); }
template <typename T>
__device__ T from_float(float value);
template <>
inline __device__ float from_float<float>(float value) {
  return value;
}
template <>
inline __device__ uint16_t from_float<uint16_t>(float value) {
  return __half_as_ushort(__float2half_rn(value));
}

// c += a b for one 16 x 32 tile of int8 and one 32 x 8 tile, a warp together (PTX ISA, mma.m16n8k32: the register of
// each lane holds four consecutive k).
inline __device__ void multiply_tiles(int (&c)[4], const int (&a)[4], const int (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same for 16 x 16 and 16 x 8 float16, added up in float32 (mma.m16n8k16: a register holds two consecutive k).
inline __device__ void multiply_tiles(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Of two float16 in a word.
inline __device__ uint32_t subtract_halves(uint32_t a, uint32_t b) {
  uint32_t difference;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(difference) : "r"(a), "r"(b));
  return difference;
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, void* stream, Arguments... arguments) {
  kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
}
inline bool launch_failed() { return cudaGetLastError() != cudaSuccess; }
// Of the current device; 0 where there is none.
inline int64_t count_multiprocessors() {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess ? count : 0;
}

#else

using emulated::from_float;
using emulated::multiply_tiles;
using emulated::subtract_halves;
using emulated::to_float;
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, void* stream, Arguments... arguments) {
  emulated::launch(reinterpret_cast<const void*>(kernel), grid, kThreads, stream, [=] { kernel(arguments...); });
}
inline bool launch_failed() { return emulated::has_failed(); }
inline int64_t count_multiprocessors() { return emulated::kMultiprocessors; }

#endif

// Of all launches since it was last asked; does not wait.
inline int launch_status() {
  if (launch_failed()) return QSK_CUDA_LAUNCH_FAILED;
  return QSK_OK;
}

constexpr uint32_t kMagnitudeBits = 0x7fffffffu;
constexpr uint32_t kInfinityBits = 0x7f800000u;

inline __device__ bool is_finite(float value) { return (__float_as_uint(value) & kMagnitudeBits) < kInfinityBits; }
inline __device__ float not_a_number() { return __uint_as_float(0x7fc00000u); }

// Byte i of four words, for i = 0..3: out[i] = {words[0].i, words[1].i, words[2].i, words[3].i}, first one lowest.
inline __device__ void transpose_bytes(const uint32_t (&words)[4], uint32_t (&out)[4]) {
  const uint32_t low01 = __byte_perm(words[0], words[1], 0x5140), high01 = __byte_perm(words[0], words[1], 0x7362);
  const uint32_t low23 = __byte_perm(words[2], words[3], 0x5140), high23 = __byte_perm(words[2], words[3], 0x7362);
  out[0] = __byte_perm(low01, low23, 0x5410);
  out[1] = __byte_perm(low01, low23, 0x7632);
  out[2] = __byte_perm(high01, high23, 0x5410);
  out[3] = __byte_perm(high01, high23, 0x7632);
}

}  // namespace qsk_cuda

#endif  // QSK_CUDA_DEVICE_H_
