// The kernel library of a bundle, loaded beside ONNX Runtime: which variants it has, and which of them ran.
#ifndef QSPARSE_DEVICE_KERNEL_LIBRARY_H_
#define QSPARSE_DEVICE_KERNEL_LIBRARY_H_

#include <string>
#include <vector>

#include "json.h"

namespace qsparse_device {

class KernelLibrary {
 public:
  // Throws std::runtime_error when the file cannot be loaded or is another library. It stays loaded.
  explicit KernelLibrary(const std::string& path);
  const std::string& path() const { return path_; }
  std::string version() const;
  std::vector<std::string> supported() const;  // variants that this machine can run, from the slowest to the fastest
  // The variant that kernels use; throws when QSPARSE_VARIANT forces one that this machine cannot run.
  std::string chosen() const;
  void reset_calls();
  Json calls() const;  // {op: {variant: count}} since the last reset, without zeros

 private:
  template <typename Function>
  Function symbol(const char* name) const;
  std::string path_;
  void* handle_;
};

}  // namespace qsparse_device

#endif  // QSPARSE_DEVICE_KERNEL_LIBRARY_H_
