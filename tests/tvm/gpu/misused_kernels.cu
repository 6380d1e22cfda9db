// Kernels in the form that TVM 0.27 gives them, for calls that the stand-in must refuse (misuses.py).
#define uchar unsigned char  // as TVM has it
extern "C" __global__ void __launch_bounds__(64) store_kernel(float* __restrict__ values, int64_t index);
extern "C" __global__ void __launch_bounds__(64) store_kernel(float* __restrict__ values, int64_t index) {
  if (((int)threadIdx.x) == 0) {
    values[index] = 1.000000e+00f;
  }
}

extern "C" __global__ void copy_kernel(float* __restrict__ to, float* __restrict__ from) {
  to[((int)threadIdx.x)] = from[((int)threadIdx.x)];
}

extern "C" __global__ void __launch_bounds__(64) some_wait_kernel(float* __restrict__ values) {
  if (((int)threadIdx.x) < 40) {
    __syncthreads();
  }
}

extern "C" __global__ void __launch_bounds__(64) large_kernel(float* __restrict__ values) {
  __shared__ alignas(64) float first[8192];
  __shared__ alignas(64) float second[8192];
  first[((int)threadIdx.x)] = values[((int)threadIdx.x)];
  __syncthreads();
  second[((int)threadIdx.x)] = first[63 - ((int)threadIdx.x)];
  __syncthreads();
  values[((int)threadIdx.x)] = second[63 - ((int)threadIdx.x)];
}

extern "C" __global__ void __launch_bounds__(64) dynamic_kernel(float* __restrict__ values) {
  extern __shared__ __align__(1024) uchar buf_dyn_shmem[];
  ((float*)buf_dyn_shmem)[((int)threadIdx.x)] = values[((int)threadIdx.x)];
  __syncthreads();
  values[((int)threadIdx.x)] = ((float*)buf_dyn_shmem)[63 - ((int)threadIdx.x)];
}
