// TopKSparsify for ONNX Runtime.
#include "op_kernel.h"
#include "qsk/topk_sparsify.h"

namespace qsparse_ort {
namespace {

template <ONNXTensorElementDataType Type>
struct TopKSparsifyKernel : Kernel {
  explicit TopKSparsifyKernel(const OrtApi& ort_api) : Kernel(ort_api, kTopKSparsify) {}

  OrtStatus* init(const OrtKernelInfo* info) {
    QSPARSE_RETURN_IF_ERROR(choose_variant());
    return selection.read(*this, info);
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* context) {
    const void* x = nullptr;
    Shape shape;
    QSPARSE_RETURN_IF_ERROR(input_data(api, context, 0, &x, &shape));
    QSPARSE_RETURN_IF_ERROR(selection.check(*this, shape));
    const int64_t width = shape.dims[shape.rank - 1];
    void* y = nullptr;
    QSPARSE_RETURN_IF_ERROR(output_data(api, context, shape, &y));
    const int64_t rows = width > 0 ? shape.elements / width : 0;
    const qsk_topk_sparsify_args args = {kKernelType<Type>,   x, y, rows, width, selection.k, selection.block,
                                         selection.rescale_l2};
    Pool pool(api, context);
    const int64_t scratch_bytes = qsk_topk_sparsify_scratch_bytes(&args, pool.parallel());
    const int status = qsk_topk_sparsify(variant, &args, pool.parallel(), thread_scratch(scratch_bytes), scratch_bytes);
    QSPARSE_RETURN_IF_ERROR(pool.take_status());
    count_call(op, variant);
    return kernel_error(api, op_name(op), status);
  }

  Selection selection;
};

template <ONNXTensorElementDataType Type>
struct TopKSparsify : Ort::CustomOpBase<TopKSparsify<Type>, TopKSparsifyKernel<Type>, true> {
  TopKSparsify() {
    this->version = kApiVersion;
    this->InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext* context) -> OrtStatusPtr {
      return infer_like_x(*inference_api, context, -1);
    };
    this->GetMayInplace = [](int** inputs, int** outputs) -> size_t {
      *inputs = new int[1]{0};
      *outputs = new int[1]{0};
      return 1;
    };
    this->ReleaseMayInplace = [](int* inputs, int* outputs) {
      delete[] inputs;
      delete[] outputs;
    };
  }
  OrtStatusPtr CreateKernelV2(const OrtApi& api, const OrtKernelInfo* info, void** kernel) const {
    return create<TopKSparsifyKernel<Type>>(api, info, kernel);
  }
  const char* GetName() const { return op_name(kTopKSparsify); }
  size_t GetInputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetInputType(size_t) const { return Type; }
  size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetOutputType(size_t) const { return Type; }
};

}  // namespace

std::vector<const OrtCustomOp*> topk_ops() {
  static const TopKSparsify<kFloat> of_float;
  static const TopKSparsify<kHalf> of_half;
  return {&of_float, &of_half};
}

}  // namespace qsparse_ort
