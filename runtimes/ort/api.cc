#include "api.h"

#include <stdlib.h>

#include <thread>

#include "qsk/variant.h"

namespace qsparse_ort {
namespace {

constexpr int64_t kMostWorkers = 64;

int64_t processor_count() {
  static const int64_t count = [] {
    const int64_t processors = std::thread::hardware_concurrency();
    return processors < 1 ? 1 : processors > kMostWorkers ? kMostWorkers : processors;
  }();
  return count;
}

struct Memory {
  void* base = nullptr;
  int64_t bytes = 0;
  ~Memory() { free(base); }
};

OrtStatus* attribute_error(const OrtApi& api, const char* op, const char* name, const char* type, OrtStatus* cause) {
  const std::string reason = api.GetErrorMessage(cause);
  api.ReleaseStatus(cause);
  return error(api, std::string("ai.qsparse:") + op + " needs the attribute " + name + " (" + type + "): " + reason);
}

}  // namespace

OrtStatus* error(const OrtApi& api, const std::string& message) {
  return api.CreateStatus(ORT_INVALID_ARGUMENT, message.c_str());
}

OrtStatus* kernel_error(const OrtApi& api, const char* op, int status) {
  if (status == QSK_OK) return nullptr;
  char reason[1024];
  qsk_variant_explain(status, reason, sizeof reason);
  return error(api, std::string("ai.qsparse:") + op + ": " + reason);
}

OrtStatus* shape_of(const OrtApi& api, const OrtValue* value, Shape* shape) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  QSPARSE_RETURN_IF_ERROR(api.GetTensorTypeAndShape(value, &info));
  OrtStatus* status = api.GetDimensionsCount(info, &shape->rank);
  if (status == nullptr && shape->rank > Shape::kMostDims) {
    status = error(api, "ai.qsparse: a tensor of rank " + std::to_string(shape->rank) + "; at most 16 is supported");
  }
  if (status == nullptr) status = api.GetDimensions(info, shape->dims, shape->rank);
  api.ReleaseTensorTypeAndShapeInfo(info);
  if (status != nullptr) return status;
  shape->elements = 1;
  for (size_t i = 0; i < shape->rank; ++i) shape->elements *= shape->dims[i];
  return nullptr;
}

std::string to_string(const Shape& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.rank; ++i) text += (i ? ", " : "") + std::to_string(shape.dims[i]);
  return text + "]";
}

OrtStatus* read_int(const OrtApi& api, const OrtKernelInfo* info, const char* op, const char* name, int64_t* value) {
  OrtStatus* status = api.KernelInfoGetAttribute_int64(info, name, value);
  return status == nullptr ? nullptr : attribute_error(api, op, name, "int", status);
}

OrtStatus* read_float(const OrtApi& api, const OrtKernelInfo* info, const char* op, const char* name, float* value) {
  OrtStatus* status = api.KernelInfoGetAttribute_float(info, name, value);
  return status == nullptr ? nullptr : attribute_error(api, op, name, "float", status);
}

OrtStatus* read_ints(const OrtApi& api, const OrtKernelInfo* info, const char* op, const char* name, int64_t* values,
                     size_t capacity, size_t* count) {
  *count = 0;
  OrtStatus* status = api.KernelInfoGetAttributeArray_int64(info, name, nullptr, count);
  if (status == nullptr && *count > capacity) {
    return error(api, std::string("ai.qsparse:") + op + ": " + name + " has " + std::to_string(*count) +
                          " entries; at most " + std::to_string(capacity) + " are supported");
  }
  if (status == nullptr && *count > 0) status = api.KernelInfoGetAttributeArray_int64(info, name, values, count);
  return status == nullptr ? nullptr : attribute_error(api, op, name, "ints", status);
}

OrtStatus* read_string(const OrtApi& api, const OrtKernelInfo* info, const char* op, const char* name,
                       std::string* value) {
  size_t size = 0;
  OrtStatus* status = api.KernelInfoGetAttribute_string(info, name, nullptr, &size);
  if (status == nullptr) {
    value->resize(size);
    status = api.KernelInfoGetAttribute_string(info, name, value->data(), &size);
  }
  if (status != nullptr) return attribute_error(api, op, name, "string", status);
  value->resize(size > 0 ? size - 1 : 0);  // without the final 0
  return nullptr;
}

Pool::Pool(const OrtApi& api, const OrtKernelContext* context) : api_(api), context_(context) {
  parallel_ = {this, run, processor_count()};
}

OrtStatus* Pool::take_status() {
  OrtStatus* status = status_;
  status_ = nullptr;
  return status;
}

void Pool::run(void* self, void (*task)(void*, int64_t), void* argument, int64_t count) {
  struct Call {
    void (*task)(void*, int64_t);
    void* argument;
  } call = {task, argument};
  Pool& pool = *static_cast<Pool*>(self);
  auto step = [](void* data, size_t index) {
    const Call& step_call = *static_cast<const Call*>(data);
    step_call.task(step_call.argument, static_cast<int64_t>(index));
  };
  OrtStatus* status = pool.api_.KernelContext_ParallelFor(pool.context_, step, static_cast<size_t>(count), 0, &call);
  if (status == nullptr) return;
  if (pool.status_ != nullptr) pool.api_.ReleaseStatus(pool.status_);
  pool.status_ = status;
}

void* thread_scratch(int64_t bytes) {
  thread_local Memory memory;
  if (bytes > memory.bytes || memory.base == nullptr) {
    constexpr int64_t kUnit = 4096;
    const int64_t rounded = (bytes + kUnit) / kUnit * kUnit;
    free(memory.base);
    memory.base = aligned_alloc(64, rounded);
    memory.bytes = memory.base ? rounded : 0;
  }
  return memory.base;
}

}  // namespace qsparse_ort
