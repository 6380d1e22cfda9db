#include "emulated_module.h"

#include <map>
#include <string>

#include "emulation.h"

namespace {

constexpr size_t kSharedLimit = 48 << 10;
constexpr size_t kSharedAlignment = 1024;
alignas(kSharedAlignment) char dynamic[kSharedLimit];

std::map<std::string, emulated_kernel>& kernels() {
  static std::map<std::string, emulated_kernel> all;
  return all;
}

std::string problem(const emulated_kernel& kernel, const unsigned* block, size_t dynamic_bytes) {
  const size_t threads = size_t{block[0]} * block[1] * block[2], shared = kernel.shared_bytes + dynamic_bytes;
  if (kernel.most_threads != 0 && threads > kernel.most_threads) {
    return "a block of " + std::to_string(threads) + " threads of a kernel that was compiled for " +
           std::to_string(kernel.most_threads);
  }
  if (shared > kSharedLimit) return std::to_string(shared) + " bytes of shared memory";
  return "";
}

}  // namespace

namespace emulated {

void register_kernel(const char* name, emulated_kernel kernel) { kernels()[name] = std::move(kernel); }
char* dynamic_shared() { return dynamic; }

}  // namespace emulated

extern "C" {

const char* emulated_take_failure();

const emulated_kernel* emulated_find(const char* name) {
  const auto found = kernels().find(name);
  return found == kernels().end() ? nullptr : &found->second;
}

size_t emulated_parameters(const emulated_kernel* kernel, const emulated_parameter** parameters) {
  *parameters = kernel->parameters.data();
  return kernel->parameters.size();
}

const char* emulated_launch(const emulated_kernel* kernel, const unsigned* grid, const unsigned* block,
                            size_t dynamic_shared_bytes, void* const* values) {
  static std::string failure;
  failure = problem(*kernel, block, dynamic_shared_bytes);
  if (!failure.empty()) return failure.c_str();
  emulated::set_shared({{kernel->shared, kernel->shared_bytes}, {dynamic, dynamic_shared_bytes}});
  emulated::run_grid(dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]),
                     [&] { kernel->call(values); });
  failure = emulated_take_failure();
  return failure.c_str();
}

int emulated_is_running() { return emulated::is_running(); }
void emulated_abandon(const char* failure) { emulated::abandon(failure); }
}
