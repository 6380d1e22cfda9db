// ONNX Runtime through its C API, loaded at run time: one session, tensors that free themselves.
#ifndef QSPARSE_DEVICE_ONNXRUNTIME_H_
#define QSPARSE_DEVICE_ONNXRUNTIME_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "onnxruntime_c_api.h"

namespace qsparse_device {

class OnnxRuntime {
 public:
  // `path`: the shared library, or empty for the system's own. Throws std::runtime_error where it cannot be loaded.
  explicit OnnxRuntime(const std::string& path);
  const OrtApi& api() const { return *api_; }
  const std::string& version() const { return version_; }
  // Throws std::runtime_error with the message of a status that is not null.
  void require(OrtStatus* status, const std::string& what) const;

 private:
  const OrtApi* api_ = nullptr;
  std::string version_;
};

// A tensor in memory that ONNX Runtime owns or that lies beside it; movable, freed once.
class Tensor {
 public:
  Tensor() = default;
  Tensor(const OnnxRuntime& runtime, OrtValue* value) : runtime_(&runtime), value_(value) {}
  Tensor(Tensor&& other) noexcept { *this = std::move(other); }
  Tensor& operator=(Tensor&& other) noexcept;
  ~Tensor();
  static Tensor of(const OnnxRuntime& runtime, const std::vector<int64_t>& shape, const std::vector<int64_t>& values);
  static Tensor empty(const OnnxRuntime& runtime, const std::vector<int64_t>& shape, ONNXTensorElementDataType type);
  OrtValue* value() const { return value_; }
  std::vector<int64_t> shape() const;
  ONNXTensorElementDataType type() const;
  void* data() const;

 private:
  const OnnxRuntime* runtime_ = nullptr;
  OrtValue* value_ = nullptr;
};

// What a graph says of one input; its shape has -1 where it is free.
struct Input {
  std::string name;
  ONNXTensorElementDataType type;
  std::vector<int64_t> shape;
};

class Session {
 public:
  // `kernels`: path of the custom-op library, or empty to run the function bodies. `threads`: 0 for all cores.
  Session(const OnnxRuntime& runtime, const std::string& graph, const std::string& kernels, int threads);
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
  const std::vector<Input>& inputs() const { return inputs_; }
  const std::vector<std::string>& outputs() const { return outputs_; }
  // The value that the graph carries under a key of its metadata; empty where there is none.
  std::string metadata(const std::string& key) const;
  // Runs once, on one tensor for each of inputs(); the outputs come in the order of outputs(). Those that have a tensor
  // in `results` are written there, and come back empty.
  std::vector<Tensor> run(const std::vector<const Tensor*>& feeds, const std::vector<const Tensor*>& results);

 private:
  void read_signature();
  const OnnxRuntime& runtime_;
  OrtEnv* env_ = nullptr;
  OrtSession* session_ = nullptr;
  std::vector<Input> inputs_;
  std::vector<std::string> outputs_;
  std::vector<const char*> input_names_, output_names_;  // as ONNX Runtime takes them at every run
};

}  // namespace qsparse_device

#endif  // QSPARSE_DEVICE_ONNXRUNTIME_H_
