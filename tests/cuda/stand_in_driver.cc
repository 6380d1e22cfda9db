// The part of the driver with which TVM loads and launches kernels. STAND_IN_KERNELS names a folder: beside each file
// "image" in its folders lies "host.so" of the same kernels for the host (host_kernels.py); a launch runs those.
#include <cuda.h>
#include <dlfcn.h>
#include <glob.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <memory>
#include <string>
#include <vector>

#include "emulated_module.h"
#include "stand_in_memory.h"
#include "stand_in_work.h"

namespace {

constexpr int kShuffled = 2;
constexpr size_t kSignalStackBytes = 64 << 10;

struct Module {
  void* library;
  decltype(&emulated_find) find;
  decltype(&emulated_parameters) parameters;
  decltype(&emulated_launch) launch;
  decltype(&emulated_is_running) is_running;
  decltype(&emulated_abandon) abandon;
};

struct Function {
  const Module* module;
  std::string name;
  const emulated_kernel* kernel;
};

struct Launch {
  Function function;
  unsigned grid[3], block[3];
  size_t shared_bytes;
  std::vector<std::vector<char>> values;
};

const Module* running = nullptr;

CUresult refuse(CUresult status, const std::string& problem) {
  stand_in::fail(cudaErrorLaunchFailure, problem);
  return status;
}

// A kernel that touches what is not its own ends; all other signals are as they would be without this.
void on_fault(int number, siginfo_t* info, void*) {
  if (running != nullptr && running->is_running()) {
    running->abandon(("an access to " + stand_in::describe(info->si_addr)).c_str());
  }
  signal(number, SIG_DFL);
}

void watch_faults() {
  static char stack[kSignalStackBytes];  // a fiber's own may be at its end
  const stack_t alternative = {stack, 0, sizeof stack};
  sigaltstack(&alternative, nullptr);
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // NODEFER: the handler does not return
  sigaction(SIGSEGV, &action, nullptr);
  sigaction(SIGBUS, &action, nullptr);
}

// Whether the image in memory begins as the file does; no byte behind the first difference is read.
bool is_image(const std::string& file, const char* image) {
  FILE* stored = fopen(file.c_str(), "rb");
  if (stored == nullptr) return false;
  int byte = 0;
  bool is_same = true;
  while (is_same && (byte = fgetc(stored)) != EOF) is_same = static_cast<unsigned char>(*image++) == byte;
  fclose(stored);
  return is_same;
}

// The host's library of the kernels in `image`, "" for none.
std::string library_of(const char* image) {
  const char* folder = getenv("STAND_IN_KERNELS");
  glob_t found = {};
  std::string library;
  if (folder != nullptr && glob((std::string(folder) + "/*/image").c_str(), 0, nullptr, &found) == 0) {
    for (size_t i = 0; i < found.gl_pathc && library.empty(); ++i) {
      const std::string path = found.gl_pathv[i];
      if (is_image(path, image)) library = path.substr(0, path.rfind('/')) + "/host.so";
    }
    globfree(&found);
  }
  return library;
}

std::string argument_problem(const emulated_parameter& parameter, const std::vector<char>& value) {
  const void* pointer;
  if (parameter.points_at_alignment == 0) return "";
  memcpy(&pointer, value.data(), sizeof pointer);
  if (pointer == nullptr) return "";  // which a kernel may have, and may not use
  if (reinterpret_cast<size_t>(pointer) % parameter.points_at_alignment != 0) return "a misaligned address";
  return stand_in::check(pointer, 1);
}

cudaError_t run(const Launch& launch) {
  const Function& function = launch.function;
  const auto fail = [&](const std::string& problem) {
    return stand_in::fail(cudaErrorLaunchFailure, function.name + ": " + problem);
  };
  const emulated_parameter* parameters;
  const size_t count = function.module->parameters(function.kernel, &parameters);
  std::vector<void*> values;
  for (size_t i = 0; i < count; ++i) {
    const std::string problem = argument_problem(parameters[i], launch.values[i]);
    if (!problem.empty()) return fail("argument " + std::to_string(i) + " is " + problem);
    values.push_back(const_cast<char*>(launch.values[i].data()));
  }
  stand_in::count(function.name);
  running = function.module;
  const std::string problem =
      function.module->launch(function.kernel, launch.grid, launch.block, launch.shared_bytes, values.data());
  running = nullptr;
  if (!problem.empty()) return fail(problem);
  for (size_t i = 0; i < count; ++i) {
    const void* pointer = nullptr;
    if (parameters[i].points_at_alignment != 0) memcpy(&pointer, values[i], sizeof pointer);
    const std::string overrun = stand_in::check_surroundings(pointer);
    if (!overrun.empty()) return fail("argument " + std::to_string(i) + ": " + overrun);
  }
  return cudaSuccess;
}

}  // namespace

extern "C" {

CUresult cuModuleLoadData(CUmodule* made, const void* image) {
  const std::string library = library_of(static_cast<const char*>(image));
  if (library.empty()) {
    return refuse(CUDA_ERROR_INVALID_IMAGE, "an image that nvcc did not make while its sources were kept");
  }
  void* opened = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (opened == nullptr) return refuse(CUDA_ERROR_INVALID_IMAGE, dlerror());
  const auto symbol = [opened](const char* name) { return dlsym(opened, name); };
  *made = reinterpret_cast<CUmodule>(
      new Module{opened, reinterpret_cast<decltype(&emulated_find)>(symbol("emulated_find")),
                 reinterpret_cast<decltype(&emulated_parameters)>(symbol("emulated_parameters")),
                 reinterpret_cast<decltype(&emulated_launch)>(symbol("emulated_launch")),
                 reinterpret_cast<decltype(&emulated_is_running)>(symbol("emulated_is_running")),
                 reinterpret_cast<decltype(&emulated_abandon)>(symbol("emulated_abandon"))});
  reinterpret_cast<void (*)(int)>(symbol("emulated_set_order"))(kShuffled);
  watch_faults();
  return CUDA_SUCCESS;
}

// A kernel may still be asked for by a graph.
CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }

CUresult cuModuleGetFunction(CUfunction* made, CUmodule handle, const char* name) {
  const Module* module = reinterpret_cast<Module*>(handle);
  const emulated_kernel* kernel = module->find(name);
  if (kernel == nullptr) return refuse(CUDA_ERROR_NOT_FOUND, std::string("no kernel ") + name);
  *made = reinterpret_cast<CUfunction>(new Function{module, name, kernel});
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction handle, void** values, void** packed) {
  const Function& function = *reinterpret_cast<Function*>(handle);
  if (packed != nullptr) return refuse(CUDA_ERROR_NOT_SUPPORTED, "arguments in one piece");
  const auto launch = std::make_shared<Launch>(Launch{function,
                                                      {config->gridDimX, config->gridDimY, config->gridDimZ},
                                                      {config->blockDimX, config->blockDimY, config->blockDimZ},
                                                      config->sharedMemBytes,
                                                      {}});
  const emulated_parameter* parameters;
  const size_t count = function.module->parameters(function.kernel, &parameters);
  for (size_t i = 0; i < count; ++i) {
    const char* value = static_cast<const char*>(values[i]);
    launch->values.emplace_back(value, value + parameters[i].bytes);
  }
  const cudaError_t status = stand_in::launch(config->hStream, [launch] { return run(*launch); });
  return status == cudaSuccess ? CUDA_SUCCESS : CUDA_ERROR_LAUNCH_FAILED;
}

CUresult cuDeviceGetName(char* name, int bytes, CUdevice) {
  snprintf(name, bytes, "stand-in");
  return CUDA_SUCCESS;
}

// TVM shows the name alone.
CUresult cuGetErrorName(CUresult, const char** text) {
  *text = stand_in::last_problem();
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult, const char** text) { return cuGetErrorName(CUDA_SUCCESS, text); }

CUresult cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  return refuse(CUDA_ERROR_NOT_SUPPORTED, "tensor maps");
}
}
