// What the custom ops of this library share: a kernel's variant, its operands, the attributes of a selection, and the
// inference of shapes.
#ifndef QSPARSE_ORT_OP_KERNEL_H_
#define QSPARSE_ORT_OP_KERNEL_H_

#include <new>
#include <string>
#include <vector>

#define ORT_API_MANUAL_INIT
#include "onnxruntime_cxx_api.h"
#undef ORT_API_MANUAL_INIT

#include "api.h"
#include "calls.h"
#include "huge_pages.h"

namespace qsparse_ort {

// The ops of each file, for every combination of types; they live as long as the process.
std::vector<const OrtCustomOp*> topk_ops();
std::vector<const OrtCustomOp*> ternary_ops();
std::vector<const OrtCustomOp*> sparse_matmul_ops();
std::vector<const OrtCustomOp*> head_ops();
std::vector<const OrtCustomOp*> decoder_ops();
std::vector<const OrtCustomOp*> cuda_ops();  // runtimes/cuda/ort_ops.cc: in libqsparse_ort_cuda only

// Shape inference gets no api argument; set by RegisterCustomOps.
extern const OrtApi* inference_api;

constexpr ONNXTensorElementDataType kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr ONNXTensorElementDataType kHalf = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;

template <ONNXTensorElementDataType Type>
constexpr int kKernelType = Type == kHalf ? QSK_FLOAT16 : QSK_FLOAT32;

std::string prefix(Op op);

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

template <typename Data>
OrtStatus* output_data(const OrtApi& api, OrtKernelContext* context, const Shape& shape, Data** data,
                       size_t position = 0) {
  OrtValue* value = nullptr;
  QSPARSE_RETURN_IF_ERROR(api.KernelContext_GetOutput(context, position, shape.dims, shape.rank, &value));
  void* raw = nullptr;
  QSPARSE_RETURN_IF_ERROR(api.GetTensorMutableData(value, &raw));
  *data = static_cast<Data*>(raw);
  return nullptr;
}

// What every kernel here has.
struct Kernel {
  Kernel(const OrtApi& ort_api, Op kernel_op) : api(ort_api), op(kernel_op) {}
  OrtStatus* choose_variant() { return kernel_error(api, op_name(op), qsk_variant_choose(&variant)); }
  const OrtApi& api;
  const Op op;
  const qsk_variant* variant = nullptr;
};

// An input that holds weights. Where it is constant, as exports make it, ONNX Runtime is asked for it once: a token
// runs hundreds of kernels that take a microsecond besides their product, and every question allocates.
class Weights {
 public:
  explicit Weights(size_t position) : position_(position) {}
  // Does nothing unless the input is constant.
  OrtStatus* init(const OrtApi& api, const OrtKernelInfo* info);
  // The same, and brings it into huge pages where they are to be had.
  OrtStatus* init_in_huge_pages(const OrtApi& api, const OrtKernelInfo* info);
  // Null unless the input is constant.
  const Shape* shape() const { return is_constant_ ? &shape_ : nullptr; }
  template <typename Data>
  OrtStatus* read(const OrtApi& api, const OrtKernelContext* context, const Data** data, Shape* shape) const {
    if (!is_constant_) return input_data(api, context, position_, data, shape);
    *data = static_cast<const Data*>(data_);
    *shape = shape_;
    return nullptr;
  }

 private:
  const size_t position_;
  bool is_constant_ = false;
  const void* data_ = nullptr;
  size_t bytes_ = 0;
  Shape shape_ = {};
  std::shared_ptr<const void> copy_;
};

// The attributes of a selection, as TopKSparsify has them.
struct Selection {
  OrtStatus* read(const Kernel& kernel, const OrtKernelInfo* info);
  OrtStatus* check(const Kernel& kernel, const Shape& x) const;

  int64_t k = 0;
  int64_t block = 0;
  bool rescale_l2 = false;
};

// The attribute `n` of ops that join several matrices.
struct OutputList {
  OrtStatus* read(const Kernel& kernel, const OrtKernelInfo* info);

  int64_t n[QSK_MOST_MATRICES] = {};
  int64_t matrices = 0;
  int64_t outputs = 0;  // of all
};

// The product of all dimensions but the last; x is no scalar.
int64_t row_count(const Shape& x);

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

// The output is x with its last dimension replaced by `last` unless that is negative.
OrtStatus* infer_like_x(const OrtApi& api, OrtShapeInferContext* context, int64_t last);
// Output `position` is the first input as it is.
OrtStatus* infer_same(const OrtApi& api, OrtShapeInferContext* context, size_t position);
// The output is x with its last dimension halved, in float32; nothing where that is not known.
OrtStatus* infer_half_as_wide(const OrtApi& api, OrtShapeInferContext* context);
// The output is the first input with one more dimension, the attribute `k`.
OrtStatus* infer_rows(const OrtApi& api, OrtShapeInferContext* context, ONNXTensorElementDataType type);
// The sum of the attribute `n`, an int or ints.
OrtStatus* sum_of_outputs(const OrtApi& api, const OrtShapeInferContext* context, OrtOpAttrType type, int64_t* sum);

// An op with one output: `Traits` has Kernel, kOp, kInputs[], kOutput and infer(context).
template <typename Traits>
struct OneOutputOp : Ort::CustomOpBase<OneOutputOp<Traits>, typename Traits::Kernel, true> {
  OneOutputOp() {
    this->version = kApiVersion;
    this->InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext* context) -> OrtStatusPtr {
      return Traits::infer(context);
    };
  }
  OrtStatusPtr CreateKernelV2(const OrtApi& api, const OrtKernelInfo* info, void** kernel) const {
    return create<typename Traits::Kernel>(api, info, kernel);
  }
  const char* GetName() const { return op_name(Traits::kOp); }
  size_t GetInputTypeCount() const { return sizeof Traits::kInputs / sizeof *Traits::kInputs; }
  ONNXTensorElementDataType GetInputType(size_t position) const { return Traits::kInputs[position]; }
  size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetOutputType(size_t) const { return Traits::kOutput; }
};

}  // namespace qsparse_ort

#endif  // QSPARSE_ORT_OP_KERNEL_H_
