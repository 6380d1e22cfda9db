// What every custom op here has: its tensors as pointers, the chosen kernel variant, and the shape of its output.
#ifndef QSPARSE_ORT_KERNEL_H_
#define QSPARSE_ORT_KERNEL_H_

#include <new>
#include <string>

#define ORT_API_MANUAL_INIT
#include "onnxruntime_cxx_api.h"
#undef ORT_API_MANUAL_INIT

#include "api.h"
#include "calls.h"
#include "qsk/status.h"

namespace qsparse_ort {

constexpr char kDomain[] = "ai.qsparse";

template <ONNXTensorElementDataType Type>
constexpr int kKernelType = Type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ? QSK_FLOAT16 : QSK_FLOAT32;

inline std::string prefix(Op op) { return std::string(kDomain) + ":" + op_name(op) + ": "; }

template <typename Data>
OrtStatus* input_data(const OrtApi& api, const OrtKernelContext* context, size_t position, const Data** data,
                      Shape* shape) {
  const OrtValue* value = nullptr;
  QSPARSE_RETURN_IF_ERROR(api.KernelContext_GetInput(context, position, &value));
  void* raw = nullptr;  // the API has no read-only access
  QSPARSE_RETURN_IF_ERROR(api.GetTensorMutableData(const_cast<OrtValue*>(value), &raw));
  *data = static_cast<const Data*>(raw);
  return shape == nullptr ? nullptr : shape_of(api, value, shape);
}

inline OrtStatus* output_data(const OrtApi& api, OrtKernelContext* context, const Shape& shape, void** data,
                              size_t position = 0) {
  OrtValue* value = nullptr;
  QSPARSE_RETURN_IF_ERROR(api.KernelContext_GetOutput(context, position, shape.dims, shape.rank, &value));
  return api.GetTensorMutableData(value, data);
}

// What every kernel here has.
struct Kernel {
  Kernel(const OrtApi& ort_api, Op kernel_op) : api(ort_api), op(kernel_op) {}
  OrtStatus* choose_variant() { return kernel_error(api, op_name(op), qsk_variant_choose(&variant)); }
  const OrtApi& api;
  const Op op;
  const qsk_variant* variant = nullptr;
};

template <typename KernelType>
OrtStatusPtr create(const OrtApi& api, const OrtKernelInfo* info, void** kernel) {
  auto* created = new (std::nothrow) KernelType(api);
  if (created == nullptr) return api.CreateStatus(ORT_FAIL, "ai.qsparse: out of memory");
  OrtStatus* status = created->init(info);
  if (status != nullptr) {
    delete created;
    return status;
  }
  *kernel = created;
  return nullptr;
}

inline const OrtApi* inference_api = nullptr;  // shape inference gets no api argument; set by RegisterCustomOps

// An output that is an input with its last dimension replaced by `last` unless that is negative, and its type by `type`
// unless that is undefined: overloads for several types share one inference.
struct Likeness {
  size_t input;
  size_t output;
  int64_t last;
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
};

// In C calls: the C++ wrapper of API 21 to 23 throws on a symbolic dimension.
OrtStatus* infer_like(const OrtApi& api, OrtShapeInferContext* context, const Likeness& likeness);
// The last dimension of an input, -1 where it is not known.
OrtStatus* last_dimension(const OrtApi& api, OrtShapeInferContext* context, size_t input, int64_t* last);

}  // namespace qsparse_ort

#endif  // QSPARSE_ORT_KERNEL_H_
