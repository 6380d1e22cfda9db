#include "onnxruntime.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <utility>

namespace qsparse_device {
namespace {

constexpr uint32_t kApiVersion = 18;  // the kernel library's own
constexpr char kSpinUs[] = "1000";    // as qsparse-run

// Whether threads spin while they wait for the next kernel: not where the user says so, nor for the milliseconds that
// releases before 1.32 may take, which do not know kSpinUs.
bool may_spin(const std::string& version) {
  const char* const word = std::getenv("QSPARSE_SPIN");
  if (word != nullptr && std::strcmp(word, "0") == 0) return false;
  int major = 0, minor = 0;
  return std::sscanf(version.c_str(), "%d.%d", &major, &minor) == 2 && (major > 1 || minor >= 32);
}

OrtMemoryInfo* cpu_memory(const OnnxRuntime& runtime) {
  static OrtMemoryInfo* info = nullptr;
  if (info == nullptr) {
    runtime.require(runtime.api().CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &info), "memory info");
  }
  return info;
}

OrtAllocator* allocator(const OnnxRuntime& runtime) {
  OrtAllocator* found = nullptr;
  runtime.require(runtime.api().GetAllocatorWithDefaultOptions(&found), "the allocator");
  return found;
}

}  // namespace

OnnxRuntime::OnnxRuntime(const std::string& path) {
  const std::vector<std::string> names =
      path.empty() ? std::vector<std::string>{"libonnxruntime.so.1", "libonnxruntime.so"} : std::vector{path};
  void* library = nullptr;
  std::string reasons;
  for (const std::string& name : names) {
    library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library != nullptr) break;
    reasons += std::string(reasons.empty() ? "" : "; ") + dlerror();
  }
  if (library == nullptr) {
    throw std::runtime_error("ONNX Runtime cannot be loaded: " + reasons +
                             ". Give the path of libonnxruntime.so with --onnxruntime");
  }
  using GetApiBase = const OrtApiBase* (*)();
  const auto get_base = reinterpret_cast<GetApiBase>(dlsym(library, "OrtGetApiBase"));
  if (get_base == nullptr) throw std::runtime_error("the library given has no OrtGetApiBase: not ONNX Runtime");
  version_ = get_base()->GetVersionString();
  api_ = get_base()->GetApi(kApiVersion);
  if (api_ == nullptr) {
    throw std::runtime_error("ONNX Runtime " + version_ + " is too old; expected 1.18 or newer");
  }
}

void OnnxRuntime::require(OrtStatus* status, const std::string& what) const {
  if (status == nullptr) return;
  const std::string message = api_->GetErrorMessage(status);
  api_->ReleaseStatus(status);
  throw std::runtime_error(what + ": " + message);
}

Tensor& Tensor::operator=(Tensor&& other) noexcept {
  std::swap(runtime_, other.runtime_);
  std::swap(value_, other.value_);
  return *this;
}

Tensor::~Tensor() {
  if (value_ != nullptr) runtime_->api().ReleaseValue(value_);
}

Tensor Tensor::of(const OnnxRuntime& runtime, const std::vector<int64_t>& shape, const std::vector<int64_t>& values) {
  Tensor made = empty(runtime, shape, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
  memcpy(made.data(), values.data(), values.size() * sizeof(int64_t));
  return made;
}

Tensor Tensor::empty(const OnnxRuntime& runtime, const std::vector<int64_t>& shape, ONNXTensorElementDataType type) {
  OrtValue* value = nullptr;
  runtime.require(runtime.api().CreateTensorAsOrtValue(allocator(runtime), shape.data(), shape.size(), type, &value),
                  "a tensor");
  return Tensor(runtime, value);
}

std::vector<int64_t> Tensor::shape() const {
  const OrtApi& api = runtime_->api();
  OrtTensorTypeAndShapeInfo* info = nullptr;
  runtime_->require(api.GetTensorTypeAndShape(value_, &info), "a tensor's shape");
  size_t rank = 0;
  OrtStatus* status = api.GetDimensionsCount(info, &rank);
  std::vector<int64_t> dims(rank);
  if (status == nullptr) status = api.GetDimensions(info, dims.data(), rank);
  api.ReleaseTensorTypeAndShapeInfo(info);
  runtime_->require(status, "a tensor's shape");
  return dims;
}

ONNXTensorElementDataType Tensor::type() const {
  const OrtApi& api = runtime_->api();
  OrtTensorTypeAndShapeInfo* info = nullptr;
  runtime_->require(api.GetTensorTypeAndShape(value_, &info), "a tensor's type");
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  OrtStatus* status = api.GetTensorElementType(info, &type);
  api.ReleaseTensorTypeAndShapeInfo(info);
  runtime_->require(status, "a tensor's type");
  return type;
}

void* Tensor::data() const {
  void* raw = nullptr;
  runtime_->require(runtime_->api().GetTensorMutableData(value_, &raw), "a tensor's data");
  return raw;
}

Session::Session(const OnnxRuntime& runtime, const std::string& graph, const std::string& kernels, int threads)
    : runtime_(runtime) {
  const OrtApi& api = runtime.api();
  cpu_memory(runtime);
  runtime.require(api.CreateEnv(ORT_LOGGING_LEVEL_ERROR, "qsparse-device-bench", &env_), "ONNX Runtime");
  OrtSessionOptions* options = nullptr;
  runtime.require(api.CreateSessionOptions(&options), "session options");
  OrtStatus* status = api.SetIntraOpNumThreads(options, threads);
  if (status == nullptr) status = api.SetInterOpNumThreads(options, 1);
  const char* const spins = may_spin(runtime.version()) ? "1" : "0";
  if (status == nullptr) status = api.AddSessionConfigEntry(options, "session.intra_op.allow_spinning", spins);
  if (status == nullptr) status = api.AddSessionConfigEntry(options, "session.intra_op.spin_duration_us", kSpinUs);
  // As qsparse-run: the bodies of n-bit products are in float32, and not rounded to 8 bits by the runtime.
  if (status == nullptr) status = api.AddSessionConfigEntry(options, "session.qdq_matmulnbits_accuracy_level", "1");
  if (status == nullptr && !kernels.empty()) status = api.RegisterCustomOpsLibrary_V2(options, kernels.c_str());
  if (status == nullptr) status = api.CreateSession(env_, graph.c_str(), options, &session_);
  api.ReleaseSessionOptions(options);
  runtime.require(status, graph);
  read_signature();
}

Session::~Session() {
  if (session_ != nullptr) runtime_.api().ReleaseSession(session_);
  if (env_ != nullptr) runtime_.api().ReleaseEnv(env_);
}

void Session::read_signature() {
  const OrtApi& api = runtime_.api();
  OrtAllocator* memory = allocator(runtime_);
  size_t count = 0;
  runtime_.require(api.SessionGetInputCount(session_, &count), "the inputs");
  for (size_t i = 0; i < count; ++i) {
    char* name = nullptr;
    OrtTypeInfo* info = nullptr;
    runtime_.require(api.SessionGetInputName(session_, i, memory, &name), "an input's name");
    runtime_.require(api.SessionGetInputTypeInfo(session_, i, &info), name);
    const OrtTensorTypeAndShapeInfo* tensor = nullptr;
    Input input{name, ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED, {}};
    size_t rank = 0;
    OrtStatus* status = api.CastTypeInfoToTensorInfo(info, &tensor);
    if (status == nullptr) status = api.GetTensorElementType(tensor, &input.type);
    if (status == nullptr) status = api.GetDimensionsCount(tensor, &rank);
    input.shape.resize(rank);
    if (status == nullptr) status = api.GetDimensions(tensor, input.shape.data(), rank);
    api.ReleaseTypeInfo(info);
    runtime_.require(status, name);
    inputs_.push_back(input);
    memory->Free(memory, name);
  }
  runtime_.require(api.SessionGetOutputCount(session_, &count), "the outputs");
  for (size_t i = 0; i < count; ++i) {
    char* name = nullptr;
    runtime_.require(api.SessionGetOutputName(session_, i, memory, &name), "an output's name");
    outputs_.emplace_back(name);
    memory->Free(memory, name);
  }
  for (const Input& input : inputs_) input_names_.push_back(input.name.c_str());
  for (const std::string& output : outputs_) output_names_.push_back(output.c_str());
}

std::string Session::metadata(const std::string& key) const {
  const OrtApi& api = runtime_.api();
  OrtAllocator* memory = allocator(runtime_);
  OrtModelMetadata* all = nullptr;
  runtime_.require(api.SessionGetModelMetadata(session_, &all), "the graph's metadata");
  char* found = nullptr;
  OrtStatus* status = api.ModelMetadataLookupCustomMetadataMap(all, memory, key.c_str(), &found);
  api.ReleaseModelMetadata(all);
  runtime_.require(status, "the graph's metadata");
  if (found == nullptr) return "";
  const std::string value = found;
  memory->Free(memory, found);
  return value;
}

std::vector<Tensor> Session::run(const std::vector<const Tensor*>& feeds, const std::vector<const Tensor*>& results) {
  std::vector<const OrtValue*> values;
  for (const Tensor* feed : feeds) values.push_back(feed->value());
  std::vector<OrtValue*> raw;
  for (const Tensor* result : results) raw.push_back(result == nullptr ? nullptr : result->value());
  runtime_.require(runtime_.api().Run(session_, nullptr, input_names_.data(), values.data(), values.size(),
                                      output_names_.data(), output_names_.size(), raw.data()),
                   "running the model");
  std::vector<Tensor> outputs(raw.size());
  for (size_t i = 0; i < raw.size(); ++i) {
    if (results[i] == nullptr) outputs[i] = Tensor(runtime_, raw[i]);
  }
  return outputs;
}

}  // namespace qsparse_device
