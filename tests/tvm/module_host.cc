// Runs the function main of a Relax module on tensors from a file, with TVM's runtime: MODULE ARGUMENTS RESULTS.
//
// ARGUMENTS: the number of tensors, then of each its DLPack type code, bits, number of dimensions, dimensions (int64)
// and bytes. RESULTS: the bytes of every result, one after the other.
#include <tvm/ffi/any.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

namespace ffi = tvm::ffi;

struct AlignedMemory {
  void AllocData(DLTensor* tensor) {
    const size_t bytes = (ffi::GetDataSize(*tensor) / 64 + 1) * 64;
    tensor->data = std::aligned_alloc(64, bytes);
  }
  void FreeData(DLTensor* tensor) { std::free(tensor->data); }
};

template <typename T>
T read(std::istream& file) {
  T value;
  if (!file.read(reinterpret_cast<char*>(&value), sizeof value))
    throw std::runtime_error("the arguments end too early");
  return value;
}

ffi::Tensor read_tensor(std::istream& file) {
  const auto code = read<int32_t>(file), bits = read<int32_t>(file), dimensions = read<int32_t>(file);
  std::vector<int64_t> shape(dimensions);
  for (auto& size : shape) size = read<int64_t>(file);
  const DLDataType type{static_cast<uint8_t>(code), static_cast<uint8_t>(bits), 1};
  ffi::Tensor tensor = ffi::Tensor::FromNDAlloc(AlignedMemory(), ffi::Shape(shape), type, DLDevice{kDLCPU, 0});
  file.read(static_cast<char*>(tensor.data_ptr()),
            static_cast<std::streamsize>(ffi::GetDataSize(*tensor.GetDLTensorPtr())));
  if (!file) throw std::runtime_error("the arguments end too early");
  return tensor;
}

ffi::Function function(const ffi::Module& module, const char* name) {
  const auto found = module->GetFunction(name);
  if (!found.has_value()) throw std::runtime_error(std::string("the module has no function ") + name);
  return found.value();
}

void run(const char* library, const char* arguments_path, const char* results_path) {
  std::ifstream file(arguments_path, std::ios::binary);
  std::vector<ffi::Any> arguments;
  for (int32_t left = read<int32_t>(file); left > 0; --left) arguments.emplace_back(read_tensor(file));
  const auto executable = ffi::Module::LoadFromFile(library);
  const auto machine = function(executable, "vm_load_executable")().cast<ffi::Module>();
  constexpr int kPooledAllocator = 2;
  function(machine, "vm_initialization")(static_cast<int>(kDLCPU), 0, kPooledAllocator);
  std::vector<ffi::AnyView> views(arguments.begin(), arguments.end());
  ffi::Any made;
  function(machine, "main").CallPacked(views.data(), static_cast<int32_t>(views.size()), &made);
  std::ofstream results(results_path, std::ios::binary);
  for (const auto& tensor : made.cast<ffi::Array<ffi::Tensor>>()) {
    results.write(static_cast<const char*>(tensor.data_ptr()),
                  static_cast<std::streamsize>(ffi::GetDataSize(*tensor.GetDLTensorPtr())));
  }
  if (!results) throw std::runtime_error("the results cannot be written");
}

}  // namespace

int main(int count, char** words) {
  if (count != 4) {
    std::fprintf(stderr, "usage: %s MODULE ARGUMENTS RESULTS\n", words[0]);
    return 2;
  }
  try {
    run(words[1], words[2], words[3]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
