// The CUDA runtime for a machine without a GPU: one device of compute capability 8.9 whose memory is the host's, and
// streams in which nothing waits: work is done when it is enqueued, or when the graph that has captured it is launched.
//
// For ONNX Runtime's CUDA provider stand_in.py adds every other function, as one that succeeds, so that kernels do
// nothing. For TVM stand_in_driver.cc runs kernels; then memory is garbage at first.
//
// STAND_IN_MEMORY: the device's bytes. STAND_IN_FAIL_AFTER: the launch after so many is enqueued and goes wrong; as on
// a GPU, the calls behind it tell, and no call succeeds any more.
#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <limits>
#include <map>
#include <set>
#include <sstream>
#include <utility>
#include <vector>

#include "stand_in_memory.h"
#include "stand_in_work.h"

namespace {

using stand_in::fail;
using stand_in::Work;

constexpr size_t kMemory = size_t{4} << 30;
constexpr char kIsGone[] = "unspecified launch failure";  // as CUDA says

struct Graph {
  std::vector<Work> works;
};

struct Stream {
  Graph* captures = nullptr;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  bool is_invalid = false;
};

struct Event {
  timespec recorded;
};

std::set<Stream*> capturing;
std::map<std::string, long> counts;
std::map<void*, size_t> pinned;  // memory of the host's, and its bytes
std::string first_problem, latest_problem;
cudaError_t latest_error = cudaSuccess;
cudaStream_t configured = nullptr;
size_t launches = 0;

size_t number_of(const char* variable, size_t otherwise) {
  const char* text = getenv(variable);
  return text == nullptr ? otherwise : strtoull(text, nullptr, 10);
}

size_t memory_bytes() { return number_of("STAND_IN_MEMORY", kMemory); }

size_t unused_bytes() {
  size_t used = stand_in::allocated_bytes();
  for (const auto& [memory, bytes] : pinned) used -= bytes;
  return memory_bytes() - used;
}

bool is_gone() { return launches > number_of("STAND_IN_FAIL_AFTER", std::numeric_limits<size_t>::max()); }

template <typename Object, typename Handle>
cudaError_t make(Handle* handle) {
  *handle = reinterpret_cast<Handle>(new Object());
  return cudaSuccess;
}

// NULL for the default streams.
Stream* stream_of(cudaStream_t handle) {
  if (handle == nullptr || handle == cudaStreamLegacy || handle == cudaStreamPerThread) return nullptr;
  return reinterpret_cast<Stream*>(handle);
}

// What waits, or takes memory, needs a device, and is forbidden while a stream captures.
cudaError_t outside_of_captures(const char* what) {
  if (is_gone()) return fail(cudaErrorLaunchFailure, kIsGone);
  for (Stream* stream : capturing) {
    if (stream->mode == cudaStreamCaptureModeRelaxed) continue;
    stream->is_invalid = true;
    return fail(cudaErrorStreamCaptureUnsupported, std::string(what) + " while a stream captures");
  }
  return cudaSuccess;
}

// 0xFF: floats that are not numbers.
int garbage() { return getenv("STAND_IN_KERNELS") != nullptr ? 0xFF : 0; }

bool is_device(cudaMemcpyKind kind, bool is_target) {
  if (kind == cudaMemcpyDeviceToDevice) return true;
  return kind == (is_target ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToHost);
}

cudaError_t copy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  if (bytes == 0) return cudaSuccess;
  for (const auto& [side, memory, is_target] :
       {std::tuple("to", static_cast<const void*>(to), true), {"from", from, false}}) {
    const std::string problem = is_device(kind, is_target) ? stand_in::check(memory, bytes) : "";
    if (!problem.empty()) return fail(cudaErrorInvalidValue, std::string("a copy ") + side + " " + problem);
  }
  const char* names[] = {"host to host", "host to device", "device to host", "device to device", "copies"};
  stand_in::count(names[kind]);
  memmove(to, from, bytes);
  return cudaSuccess;
}

}  // namespace

namespace stand_in {

cudaError_t perform(cudaStream_t handle, Work work) {
  if (is_gone()) return fail(cudaErrorLaunchFailure, kIsGone);
  Stream* stream = stream_of(handle);
  if (stream != nullptr && stream->captures != nullptr) {
    stream->captures->works.push_back(std::move(work));
    return cudaSuccess;
  }
  if (stream == nullptr && !capturing.empty()) {
    (*capturing.begin())->is_invalid = true;
    return fail(cudaErrorStreamCaptureImplicit, "work on the default stream while another one captures");
  }
  return work();
}

cudaError_t launch(cudaStream_t stream, Work kernel) {
  return perform(stream, [kernel] {
    ++launches;
    return is_gone() ? cudaSuccess : kernel();
  });
}

cudaError_t fail(cudaError_t status, const std::string& problem) {
  latest_error = status;
  latest_problem = problem;
  if (first_problem.empty()) first_problem = problem;
  return status;
}

const char* last_problem() { return is_gone() ? kIsGone : latest_problem.c_str(); }

void count(const std::string& what) { ++counts[what]; }

}  // namespace stand_in

extern "C" {

// JSON: what was counted since the last time, and the bytes that are allocated now.
const char* stand_in_take_counts() {
  static std::string text;
  std::ostringstream json;
  json << "{\"allocated_bytes\": " << stand_in::allocated_bytes();
  for (const auto& [what, times] : std::exchange(counts, {})) json << ", \"" << what << "\": " << times;
  text = json.str() + "}";
  return text.c_str();
}

// The first thing that was wrong, "" for nothing.
const char* stand_in_problem() { return first_problem.c_str(); }

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int) { return cudaSuccess; }

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  memset(properties, 0, sizeof *properties);
  strcpy(properties->name, "stand-in");
  properties->major = 8;
  properties->minor = 9;
  properties->multiProcessorCount = 4;
  properties->totalGlobalMem = memory_bytes();
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
  const std::map<cudaDeviceAttr, size_t> values = {
      {cudaDevAttrComputeCapabilityMajor, properties.major},
      {cudaDevAttrComputeCapabilityMinor, properties.minor},
      {cudaDevAttrMultiProcessorCount, properties.multiProcessorCount},
      {cudaDevAttrWarpSize, properties.warpSize},
      {cudaDevAttrMaxThreadsPerBlock, properties.maxThreadsPerBlock},
      {cudaDevAttrMaxSharedMemoryPerBlock, properties.sharedMemPerBlock},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, properties.sharedMemPerBlockOptin},
  };
  const auto found = values.find(attribute);
  *value = found == values.end() ? 0 : static_cast<int>(found->second);
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
  *total = memory_bytes();
  *unused = unused_bytes();
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  const cudaError_t refused = outside_of_captures("cudaMalloc");
  if (refused != cudaSuccess) return refused;
  *memory = bytes <= unused_bytes() ? stand_in::allocate(bytes, garbage()) : nullptr;
  if (*memory == nullptr && bytes > 0) return fail(cudaErrorMemoryAllocation, "out of memory");
  return cudaSuccess;
}

cudaError_t cudaFree(void* memory) {
  const cudaError_t refused = outside_of_captures("cudaFree");
  if (refused != cudaSuccess) return refused;
  const std::string problem = stand_in::release(memory);
  return problem.empty() ? cudaSuccess : fail(cudaErrorInvalidValue, problem);
}

cudaError_t cudaMallocHost(void** memory, size_t bytes) {
  const cudaError_t refused = outside_of_captures("cudaMallocHost");
  if (refused != cudaSuccess) return refused;
  *memory = stand_in::allocate(bytes, garbage());
  pinned[*memory] = bytes;
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) { return cudaMallocHost(memory, bytes); }
cudaError_t cudaFreeHost(void* memory) {
  pinned.erase(memory);
  return cudaFree(memory);
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  const cudaError_t refused = outside_of_captures("cudaMemcpy");
  return refused != cudaSuccess ? refused : copy(to, from, bytes, kind);
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  return stand_in::perform(stream, [=] { return copy(to, from, bytes, kind); });
}

cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t stream) {
  return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream);
}

cudaError_t cudaMemset(void* memory, int value, size_t bytes) {
  if (is_gone()) return fail(cudaErrorLaunchFailure, kIsGone);
  memset(memory, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream) {
  return stand_in::perform(stream, [=] { return cudaMemset(memory, value, bytes); });
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void*) {
  memset(attributes, 0, sizeof *attributes);
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return make<Stream>(stream); }
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return make<Stream>(stream); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return make<Event>(event); }
cudaError_t cudaEventCreate(cudaEvent_t* event) { return make<Event>(event); }

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  capturing.erase(stream_of(stream));
  delete stream_of(stream);
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete reinterpret_cast<Event*>(event);
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t) { return outside_of_captures("cudaStreamSynchronize"); }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return outside_of_captures("cudaEventSynchronize"); }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return stand_in::perform(stream, [=] {
    clock_gettime(CLOCK_MONOTONIC, &reinterpret_cast<Event*>(event)->recorded);
    return cudaSuccess;
  });
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  const timespec &first = reinterpret_cast<Event*>(begin)->recorded, &last = reinterpret_cast<Event*>(end)->recorded;
  *milliseconds = static_cast<float>((last.tv_sec - first.tv_sec) * 1e3 + (last.tv_nsec - first.tv_nsec) * 1e-6);
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  Stream* stream = stream_of(handle);
  if (stream == nullptr || stream->captures != nullptr) {
    return fail(cudaErrorStreamCaptureUnsupported, "a capture of the default stream, or of one that captures");
  }
  *stream = {new Graph(), mode, false};
  capturing.insert(stream);
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  Stream* stream = stream_of(handle);
  if (stream == nullptr || stream->captures == nullptr) {
    return fail(cudaErrorIllegalState, "the end of a capture that has not begun");
  }
  capturing.erase(stream);
  Graph* captured = std::exchange(stream->captures, nullptr);
  *graph = stream->is_invalid ? nullptr : reinterpret_cast<cudaGraph_t>(captured);
  if (!stream->is_invalid) return cudaSuccess;
  delete captured;
  return fail(cudaErrorStreamCaptureInvalidated, "a capture during which something forbidden was called");
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  const Stream* stream = stream_of(handle);
  *status = stream == nullptr || stream->captures == nullptr ? cudaStreamCaptureStatusNone
            : stream->is_invalid                             ? cudaStreamCaptureStatusInvalidated
                                                             : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* made, cudaGraph_t graph, unsigned long long) {
  *made = reinterpret_cast<cudaGraphExec_t>(new Graph(*reinterpret_cast<Graph*>(graph)));
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  return stand_in::perform(stream, [=] {
    stand_in::count("graphs");
    for (const Work& work : reinterpret_cast<Graph*>(graph)->works) {
      const cudaError_t status = work();
      if (status != cudaSuccess) return status;
    }
    return cudaSuccess;
  });
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  delete reinterpret_cast<Graph*>(graph);
  return cudaSuccess;
}

// What <<<>>> becomes: the stream is handed over to the launch.
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, cudaStream_t stream) {
  configured = stream;
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* bytes, void* stream) {
  *grid = *block = dim3(1);
  *bytes = 0;
  *static_cast<cudaStream_t*>(stream) = configured;
  return cudaSuccess;
}

// Of ONNX Runtime: they do nothing.
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t stream) {
  return stand_in::launch(stream, [] {
    stand_in::count("provider's kernels");
    return cudaSuccess;
  });
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** values, size_t bytes,
                               cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, values, bytes, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** values) {
  return cudaLaunchKernel(kernel, config->gridDim, config->blockDim, values, 0, config->stream);
}

// Of this project, emulated: emulation.cc calls it where it is there.
void stand_in_launch(void* stream, const std::function<void()>& kernel) {
  stand_in::launch(static_cast<cudaStream_t>(stream), [kernel] {
    stand_in::count("own kernels");
    kernel();
    return cudaSuccess;
  });
}

cudaError_t cudaPeekAtLastError() { return is_gone() ? cudaErrorLaunchFailure : latest_error; }
cudaError_t cudaGetLastError() {
  const cudaError_t latest = cudaPeekAtLastError();
  latest_error = cudaSuccess;
  return latest;
}
const char* cudaGetErrorName(cudaError_t) { return "stand-in"; }
const char* cudaGetErrorString(cudaError_t) { return stand_in::last_problem(); }

void** __cudaRegisterFatBinary(void*) { return static_cast<void**>(malloc(sizeof(void*))); }
}
