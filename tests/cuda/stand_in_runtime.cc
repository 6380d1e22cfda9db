// What ONNX Runtime's CUDA provider asks of the CUDA runtime, for a machine without a GPU: one device of compute
// capability 8.9 whose memory is the host's, streams in which nothing waits, and kernels that do nothing. stand_in.py
// adds every other function, as one that succeeds.
#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>

namespace {

constexpr size_t kMemory = size_t{4} << 30;
constexpr size_t kAlignment = 256;

template <typename Handle>
cudaError_t make(Handle* handle) {
  *handle = static_cast<Handle>(malloc(1));
  return cudaSuccess;
}

}  // namespace

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  memset(properties, 0, sizeof *properties);
  strcpy(properties->name, "stand-in");
  properties->major = 8;
  properties->minor = 9;
  properties->multiProcessorCount = 4;
  properties->totalGlobalMem = kMemory;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsPerMultiProcessor = 1536;
  properties->regsPerBlock = 65536;
  properties->sharedMemPerBlock = 48 << 10;
  properties->sharedMemPerBlockOptin = 99 << 10;
  properties->sharedMemPerMultiprocessor = 100 << 10;
  properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
  properties->maxThreadsDim[2] = 64;
  properties->maxGridSize[0] = 2147483647;
  properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  cudaDeviceProp properties;
  cudaGetDeviceProperties(&properties, 0);
  *value = attribute == cudaDevAttrComputeCapabilityMajor         ? properties.major
           : attribute == cudaDevAttrComputeCapabilityMinor       ? properties.minor
           : attribute == cudaDevAttrMultiProcessorCount          ? properties.multiProcessorCount
           : attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? static_cast<int>(properties.sharedMemPerBlockOptin)
                                                                  : 0;
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024;
  attributes->binaryVersion = attributes->ptxVersion = 89;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  *blocks = 2;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }

cudaError_t cudaMemGetInfo(size_t* unused, size_t* total) {
  *unused = *total = kMemory;
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  *memory = aligned_alloc(kAlignment, (bytes + kAlignment) / kAlignment * kAlignment);
  if (*memory == nullptr) return cudaErrorMemoryAllocation;
  memset(*memory, 0, bytes);
  return cudaSuccess;
}

cudaError_t cudaFree(void* memory) {
  free(memory);
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) { return cudaMalloc(memory, bytes); }
cudaError_t cudaMallocHost(void** memory, size_t bytes) { return cudaMalloc(memory, bytes); }
cudaError_t cudaFreeHost(void* memory) { return cudaFree(memory); }

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpy(to, from, bytes, kind);
}

cudaError_t cudaMemset(void* memory, int value, size_t bytes) {
  memset(memory, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  return cudaMemset(memory, value, bytes);
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void*) {
  memset(attributes, 0, sizeof *attributes);
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return make(stream); }
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return make(stream); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return make(event); }
cudaError_t cudaEventCreate(cudaEvent_t* event) { return make(event); }

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

const char* cudaGetErrorName(cudaError_t) { return "stand-in"; }
const char* cudaGetErrorString(cudaError_t) { return "stand-in"; }

void** __cudaRegisterFatBinary(void*) { return static_cast<void**>(malloc(sizeof(void*))); }
}
