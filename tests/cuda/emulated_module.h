// Kernels that are found by name and get their arguments as a driver passes them: a pointer to each value.
#ifndef QSK_TESTS_CUDA_EMULATED_MODULE_H_
#define QSK_TESTS_CUDA_EMULATED_MODULE_H_

#include <stddef.h>

#include <functional>
#include <type_traits>
#include <utility>
#include <vector>

extern "C" {
// points_at_alignment: 0 for a number.
struct emulated_parameter {
  size_t bytes;
  size_t points_at_alignment;
};
struct emulated_kernel;

// NULL where there is none.
const emulated_kernel* emulated_find(const char* name);
size_t emulated_parameters(const emulated_kernel* kernel, const emulated_parameter** parameters);
// Runs the grid; the failure, "" for none. grid and block: x, y, z.
const char* emulated_launch(const emulated_kernel* kernel, const unsigned* grid, const unsigned* block,
                            size_t dynamic_shared_bytes, void* const* values);
int emulated_is_running();
// Out of a signal that the running kernel has raised.
void emulated_abandon(const char* failure);
}

struct emulated_kernel {
  std::vector<emulated_parameter> parameters;
  unsigned most_threads;  // __launch_bounds__; 0 for none
  char* shared;
  size_t shared_bytes;
  std::function<void(void* const*)> call;
};

namespace emulated {

template <typename Parameter>
emulated_parameter parameter() {
  if constexpr (!std::is_pointer_v<Parameter>) {
    return {sizeof(Parameter), 0};
  } else if constexpr (std::is_void_v<std::remove_pointer_t<Parameter>>) {
    return {sizeof(Parameter), 1};
  } else {
    return {sizeof(Parameter), alignof(std::remove_pointer_t<Parameter>)};
  }
}

template <typename... Parameters, size_t... I>
std::function<void(void* const*)> caller(void (*kernel)(Parameters...), std::index_sequence<I...>) {
  return [kernel](void* const* values) { kernel(*static_cast<Parameters*>(values[I])...); };
}

void register_kernel(const char* name, emulated_kernel kernel);

// Makes a kernel known where it is defined; its shared variables lie from `shared` to `shared_end`.
struct Registration {
  template <typename... Parameters>
  Registration(const char* name, void (*kernel)(Parameters...), unsigned most_threads, char* shared, char* shared_end) {
    register_kernel(name, {{parameter<Parameters>()...},
                           most_threads,
                           shared,
                           static_cast<size_t>(shared_end - shared),
                           caller(kernel, std::index_sequence_for<Parameters...>())});
  }
};

// What a kernel has of shared memory besides; at most 48 KiB with its own.
char* dynamic_shared();

}  // namespace emulated

#endif  // QSK_TESTS_CUDA_EMULATED_MODULE_H_
