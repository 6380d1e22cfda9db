#include "kernel_library.h"

#include <dlfcn.h>

#include <cstdint>
#include <stdexcept>

namespace qsparse_device {

KernelLibrary::KernelLibrary(const std::string& path) : path_(path), handle_(dlopen(path.c_str(), RTLD_NOW)) {
  if (handle_ == nullptr) throw std::runtime_error("the kernel library cannot be loaded: " + std::string(dlerror()));
}

template <typename Function>
Function KernelLibrary::symbol(const char* name) const {
  void* found = dlsym(handle_, name);
  if (found == nullptr)
    throw std::runtime_error(path_ + " has no " + name + ": it is no kernel library of this project");
  return reinterpret_cast<Function>(found);
}

std::string KernelLibrary::version() const { return symbol<const char* (*)()>("qsk_version")(); }

std::vector<std::string> KernelLibrary::supported() const {
  const auto count = symbol<int64_t (*)()>("qsk_variant_count")();
  const auto at = symbol<const void* (*)(int64_t)>("qsk_variant_at");
  const auto is_supported = symbol<int (*)(const void*)>("qsk_variant_is_supported");
  const auto name = symbol<const char* (*)(const void*)>("qsk_variant_name");
  std::vector<std::string> names;
  for (int64_t i = 0; i < count; ++i) {
    if (is_supported(at(i))) names.emplace_back(name(at(i)));
  }
  return names;
}

std::string KernelLibrary::chosen() const {
  const void* variant = nullptr;
  const int status = symbol<int (*)(const void**)>("qsk_variant_choose")(&variant);
  if (status != 0) {
    char reason[1024];
    symbol<int64_t (*)(int, char*, int64_t)>("qsk_variant_explain")(status, reason, sizeof reason);
    throw std::runtime_error(reason);
  }
  return symbol<const char* (*)(const void*)>("qsk_variant_name")(variant);
}

void KernelLibrary::reset_calls() { symbol<void (*)()>("qsparse_ort_reset_calls")(); }

Json KernelLibrary::calls() const {
  const auto read = symbol<int64_t (*)(char*, int64_t)>("qsparse_ort_calls");
  std::string text(static_cast<size_t>(read(nullptr, 0)), '\0');
  read(text.data(), static_cast<int64_t>(text.size()));
  return Json::parse(text.c_str());
}

}  // namespace qsparse_device
