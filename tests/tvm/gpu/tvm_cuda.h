// What the CUDA source that TVM 0.27 emits has from nvcc and CUDA's headers, beyond what the emulation brings.
#ifndef QSK_TESTS_TVM_CUDA_H_
#define QSK_TESTS_TVM_CUDA_H_

#include <algorithm>
#include <cmath>

#include "emulated_module.h"
#include "emulation.h"

#define __CUDA_ARCH__ 800
#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 0
#define __host__
#define __forceinline__ inline
#define __align__(bytes) __attribute__((aligned(bytes)))
// Standard attributes may not stand behind __shared__, where nvcc takes them.
#define alignas(bytes) __attribute__((aligned(bytes)))

using half = _Float16;
using __half = half;
inline bool __hgt(half a, half b) { return a > b; }
inline bool __hlt(half a, half b) { return a < b; }
inline half __float2half_rn(float value) { return static_cast<half>(value); }
inline half __float2half(float value) { return static_cast<half>(value); }
inline float __half2float(half value) { return static_cast<float>(value); }
inline half hexp(half value) { return __float2half(expf(value)); }
inline half hsqrt(half value) { return __float2half(sqrtf(value)); }
inline half hrsqrt(half value) { return __float2half(1 / sqrtf(value)); }
inline half htanh(half value) { return __float2half(tanhf(value)); }

// Of CUDA, max and min give the number where one of the two is NaN.
inline float max(float a, float b) { return fmaxf(a, b); }
inline float min(float a, float b) { return fminf(a, b); }
inline int max(int a, int b) { return std::max(a, b); }
inline int min(int a, int b) { return std::min(a, b); }
inline int64_t max(int64_t a, int64_t b) { return std::max(a, b); }
inline int64_t min(int64_t a, int64_t b) { return std::min(a, b); }
inline uint32_t max(uint32_t a, uint32_t b) { return std::max(a, b); }
inline uint32_t min(uint32_t a, uint32_t b) { return std::min(a, b); }

inline float rsqrtf(float value) { return 1 / sqrtf(value); }
inline int __float_as_int(float value) { return static_cast<int>(__float_as_uint(value)); }
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<uint32_t>(bits)); }
template <typename T>
T __ldg(const T* address) {
  return *address;
}
// The emulation demands that all lanes take part in an exchange.
inline uint32_t __activemask() { return ~uint32_t{0}; }

#define QSK_VECTORS(Type, name)                                                                    \
  struct __align__(2 * sizeof(Type)) name##2 { Type x, y; };                                       \
  struct __align__(std::min(16, static_cast<int>(4 * sizeof(Type)))) name##4 { Type x, y, z, w; }; \
  inline name##2 make_##name##2(Type x, Type y) { return {x, y}; }                                 \
  inline name##4 make_##name##4(Type x, Type y, Type z, Type w) { return {x, y, z, w}; }
#define QSK_VECTOR_PAIR(Type, name)                          \
  struct __align__(2 * sizeof(Type)) name##2 { Type x, y; }; \
  inline name##2 make_##name##2(Type x, Type y) { return {x, y}; }
QSK_VECTORS(unsigned, uint)
QSK_VECTORS(int16_t, short)
QSK_VECTORS(uint16_t, ushort)
QSK_VECTORS(signed char, char)
QSK_VECTORS(unsigned char, uchar)
QSK_VECTORS(long long, longlong)
QSK_VECTORS(unsigned long long, ulonglong)
QSK_VECTORS(double, double)
QSK_VECTOR_PAIR(int, int)  // int4 and float4 are the emulation's
QSK_VECTOR_PAIR(float, float)
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
QSK_VECTOR_PAIR(half, half)  // half4 is TVM's
using __half2 = half2;
struct uint1 {
  unsigned x;
};
inline uint1 make_uint1(unsigned x) { return {x}; }

// The variables of kernel number `number` that a block shares: they lie together.
#define QSK_SHARED_VARIABLE(number) static __attribute__((section("shared_" #number)))
#define QSK_REGISTER(kernel, most_threads, number)                                                                 \
  extern "C" __attribute__((weak, visibility("hidden"))) char __start_shared_##number[];                           \
  extern "C" __attribute__((weak, visibility("hidden"))) char __stop_shared_##number[];                            \
  static const emulated::Registration registered_##kernel(#kernel, &kernel, most_threads, __start_shared_##number, \
                                                          __stop_shared_##number);

#endif  // QSK_TESTS_TVM_CUDA_H_
