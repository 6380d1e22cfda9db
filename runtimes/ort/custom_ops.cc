// The kernel library as ONNX Runtime custom ops, domain "ai.qsparse". Each op is a thin wrapper: it reads attributes
// and checks shapes, the kernels do the rest. Semantics: runtimes/kernels/include/qsk/*.h.
#include <mutex>
#include <string>
#include <vector>

#include "decoder_ops.h"
#include "kernel.h"
#include "qsk/sparse_ternary_matmul.h"
#include "qsk/ternary_matmul.h"
#include "qsk/topk_sparsify.h"

namespace qsparse_ort {
namespace {

// The attributes of a selection, as TopKSparsify has them.
struct Selection {
  OrtStatus* read(const Kernel& kernel, const OrtKernelInfo* info) {
    const OrtApi& api = kernel.api;
    const Op op = kernel.op;
    QSPARSE_RETURN_IF_ERROR(read_int(api, info, op_name(op), "k", &k));
    QSPARSE_RETURN_IF_ERROR(read_int(api, info, op_name(op), "block", &block));
    std::string rescale;
    QSPARSE_RETURN_IF_ERROR(read_string(api, info, op_name(op), "rescale", &rescale));
    if (rescale != "none" && rescale != "l2") {
      return error(api, prefix(op) + "rescale is \"" + rescale + "\"; expected \"none\" or \"l2\"");
    }
    rescale_l2 = rescale == "l2";
    if (block < 0) return error(api, prefix(op) + "block is " + std::to_string(block) + "; expected 0 or more");
    if (k < 0 || (block > 0 && k > block)) {
      return error(api, prefix(op) + "k is " + std::to_string(k) + "; expected 0.." +
                            (block > 0 ? std::to_string(block) + " (the block)" : "width of x"));
    }
    return nullptr;
  }

  OrtStatus* check(const Kernel& kernel, const Shape& x) const {
    if (x.rank == 0) return error(kernel.api, prefix(kernel.op) + "x is a scalar; expected [..., K]");
    const int64_t width = x.dims[x.rank - 1];
    if (block > 0 || k <= width) return nullptr;
    return error(kernel.api, prefix(kernel.op) + "k is " + std::to_string(k) + " but x is " + to_string(x) +
                                 "; expected 0.." + std::to_string(width));
  }

  int64_t k = 0;
  int64_t block = 0;
  bool rescale_l2 = false;
};

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
struct TernaryMatMulKernel : Kernel {
  explicit TernaryMatMulKernel(const OrtApi& ort_api) : Kernel(ort_api, kTernaryMatMul) {}

  OrtStatus* init(const OrtKernelInfo* info) {
    QSPARSE_RETURN_IF_ERROR(choose_variant());
    QSPARSE_RETURN_IF_ERROR(read_int(api, info, op_name(op), "n", &n));
    if (n < 0) return error(api, prefix(op) + "n is " + std::to_string(n) + "; expected 0 or more");
    int is_constant = 0;
    const OrtValue* weights = nullptr;
    QSPARSE_RETURN_IF_ERROR(api.KernelInfoGetConstantInput_tensor(info, 1, &is_constant, &weights));
    if (!is_constant) return nullptr;
    has_constant_weights = true;
    QSPARSE_RETURN_IF_ERROR(shape_of(api, weights, &weights_shape));
    return check_weights();
  }

  OrtStatus* check_weights() const {
    const int64_t row_bytes = qsk_ternary_row_bytes(n);
    if (weights_shape.rank == 2 && weights_shape.dims[1] == row_bytes) return nullptr;
    return error(api, prefix(op) + "w is " + to_string(weights_shape) + "; " + std::to_string(n) +
                          " outputs take [K, " + std::to_string(row_bytes) + "]");
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* context) {
    const void* x = nullptr;
    const uint8_t* w = nullptr;
    const float* scale = nullptr;
    Shape shape, scale_shape;
    QSPARSE_RETURN_IF_ERROR(input_data(api, context, 0, &x, &shape));
    QSPARSE_RETURN_IF_ERROR(input_data(api, context, 1, &w, has_constant_weights ? nullptr : &weights_shape));
    QSPARSE_RETURN_IF_ERROR(input_data(api, context, 2, &scale, &scale_shape));
    if (!has_constant_weights) QSPARSE_RETURN_IF_ERROR(check_weights());
    if (scale_shape.elements != 1) {
      return error(api, prefix(op) + "scale is " + to_string(scale_shape) + "; expected one element");
    }
    const int64_t k = weights_shape.dims[0];
    if (shape.rank == 0 || shape.dims[shape.rank - 1] != k) {
      return error(api, prefix(op) + "x is " + to_string(shape) + " but w is " + to_string(weights_shape) +
                            "; expected x as [..., " + std::to_string(k) + "]");
    }
    int64_t m = 1;
    for (size_t i = 0; i + 1 < shape.rank; ++i) m *= shape.dims[i];
    shape.dims[shape.rank - 1] = n;
    void* y = nullptr;
    QSPARSE_RETURN_IF_ERROR(output_data(api, context, shape, &y));
    const qsk_ternary_matmul_args args = {kKernelType<Type>, x, w, *scale, y, m, k, n};
    Pool pool(api, context);
    const int64_t scratch_bytes = qsk_ternary_matmul_scratch_bytes(&args, pool.parallel());
    const int status =
        qsk_ternary_matmul(variant, &args, pool.parallel(), thread_scratch(scratch_bytes), scratch_bytes);
    QSPARSE_RETURN_IF_ERROR(pool.take_status());
    count_call(op, variant);
    return kernel_error(api, op_name(op), status);
  }

  int64_t n = 0;
  bool has_constant_weights = false;
  Shape weights_shape = {};
};

template <ONNXTensorElementDataType Type>
struct SparseTernaryMatMulKernel : Kernel {
  explicit SparseTernaryMatMulKernel(const OrtApi& ort_api) : Kernel(ort_api, kSparseTernaryMatMul) {}

  OrtStatus* init(const OrtKernelInfo* info) {
    QSPARSE_RETURN_IF_ERROR(choose_variant());
    QSPARSE_RETURN_IF_ERROR(selection.read(*this, info));
    size_t count = 0;
    QSPARSE_RETURN_IF_ERROR(read_ints(api, info, op_name(op), "n", n, QSK_MOST_MATRICES, &count));
    matrices = static_cast<int64_t>(count);
    for (int64_t i = 0; i < matrices; ++i) {
      if (n[i] < 0) return error(api, prefix(op) + "n has the entry " + std::to_string(n[i]) + "; expected 0 or more");
      outputs += n[i];
      row_bytes += qsk_ternary_row_bytes(n[i]);
    }
    return nullptr;
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* context) {
    const void* x = nullptr;
    const uint8_t* w = nullptr;
    const float* scales = nullptr;
    Shape shape, weights, scales_shape;
    QSPARSE_RETURN_IF_ERROR(input_data(api, context, 0, &x, &shape));
    QSPARSE_RETURN_IF_ERROR(input_data(api, context, 1, &w, &weights));
    QSPARSE_RETURN_IF_ERROR(input_data(api, context, 2, &scales, &scales_shape));
    QSPARSE_RETURN_IF_ERROR(selection.check(*this, shape));
    const int64_t k = shape.dims[shape.rank - 1];
    if (weights.rank != 2 || weights.dims[0] != k || weights.dims[1] != row_bytes) {
      return error(api, prefix(op) + "x is " + to_string(shape) + " and w is " + to_string(weights) +
                            "; expected w as [" + std::to_string(k) + ", " + std::to_string(row_bytes) + "]");
    }
    if (scales_shape.rank != 1 || scales_shape.dims[0] != matrices) {
      return error(api, prefix(op) + "scales is " + to_string(scales_shape) + "; expected [" +
                            std::to_string(matrices) + "], one for each entry of n");
    }
    int64_t m = 1;
    for (size_t i = 0; i + 1 < shape.rank; ++i) m *= shape.dims[i];
    shape.dims[shape.rank - 1] = outputs;
    void* y = nullptr;
    QSPARSE_RETURN_IF_ERROR(output_data(api, context, shape, &y));
    qsk_sparse_ternary_matmul_args args = {};
    args.type = kKernelType<Type>;
    args.x = x;
    args.w = w;
    args.scales = scales;
    args.n = n;
    args.matrices = matrices;
    args.y = y;
    args.m = m;
    args.k = k;
    args.top_k = selection.k;
    args.block = selection.block;
    args.rescale_l2 = selection.rescale_l2;
    Pool pool(api, context);
    const int64_t scratch_bytes = qsk_sparse_ternary_matmul_scratch_bytes(&args, pool.parallel());
    const int status =
        qsk_sparse_ternary_matmul(variant, &args, pool.parallel(), thread_scratch(scratch_bytes), scratch_bytes);
    QSPARSE_RETURN_IF_ERROR(pool.take_status());
    count_call(op, variant);
    return kernel_error(api, op_name(op), status);
  }

  Selection selection;
  int64_t n[QSK_MOST_MATRICES] = {};
  int64_t matrices = 0;
  int64_t outputs = 0;
  int64_t row_bytes = 0;
};

// The sum of the attribute `n`, an int or ints.
OrtStatus* sum_of_outputs(const OrtApi& api, const OrtShapeInferContext* context, OrtOpAttrType type, int64_t* sum) {
  const OrtOpAttr* attribute = nullptr;
  QSPARSE_RETURN_IF_ERROR(api.ShapeInferContext_GetAttribute(context, "n", &attribute));
  int64_t n[QSK_MOST_MATRICES] = {};
  size_t bytes = 0;
  QSPARSE_RETURN_IF_ERROR(api.ReadOpAttr(attribute, type, n, type == ORT_OP_ATTR_INT ? sizeof *n : sizeof n, &bytes));
  *sum = 0;
  for (int64_t one : n) *sum += one;
  return nullptr;
}

template <ONNXTensorElementDataType Type>
struct TopKSparsify : Ort::CustomOpBase<TopKSparsify<Type>, TopKSparsifyKernel<Type>, true> {
  TopKSparsify() {
    this->version = kApiVersion;
    this->InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext* context) -> OrtStatusPtr {
      return infer_like(*inference_api, context, {0, 0, -1});
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

// TernaryMatMul and SparseTernaryMatMul: x, packed weights and scales in, one tensor out.
template <Op kOp, OrtOpAttrType kOutputs, typename KernelType, ONNXTensorElementDataType Type>
struct TernaryOp : Ort::CustomOpBase<TernaryOp<kOp, kOutputs, KernelType, Type>, KernelType, true> {
  TernaryOp() {
    this->version = kApiVersion;
    this->InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext* context) -> OrtStatusPtr {
      int64_t n = 0;
      QSPARSE_RETURN_IF_ERROR(sum_of_outputs(*inference_api, context, kOutputs, &n));
      return infer_like(*inference_api, context, {0, 0, n});
    };
  }
  OrtStatusPtr CreateKernelV2(const OrtApi& api, const OrtKernelInfo* info, void** kernel) const {
    return create<KernelType>(api, info, kernel);
  }
  const char* GetName() const { return op_name(kOp); }
  size_t GetInputTypeCount() const { return 3; }
  ONNXTensorElementDataType GetInputType(size_t position) const {
    return position == 0   ? Type
           : position == 1 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8
                           : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
  size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetOutputType(size_t) const { return Type; }
};

template <ONNXTensorElementDataType Type>
using TernaryMatMul = TernaryOp<kTernaryMatMul, ORT_OP_ATTR_INT, TernaryMatMulKernel<Type>, Type>;
template <ONNXTensorElementDataType Type>
using SparseTernaryMatMul = TernaryOp<kSparseTernaryMatMul, ORT_OP_ATTR_INTS, SparseTernaryMatMulKernel<Type>, Type>;

std::vector<const OrtCustomOp*> all_ops() {
  static const TopKSparsify<ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT> topk_float;
  static const TopKSparsify<ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16> topk_half;
  static const TernaryMatMul<ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT> ternary_float;
  static const TernaryMatMul<ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16> ternary_half;
  static const SparseTernaryMatMul<ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT> sparse_ternary_float;
  static const SparseTernaryMatMul<ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16> sparse_ternary_half;
  return {&topk_float, &topk_half, &ternary_float, &ternary_half, &sparse_ternary_float, &sparse_ternary_half};
}

// ORT keeps pointers to the domain as long as a session uses it, and does not say when that ends.
void keep(OrtCustomOpDomain* domain) {
  static std::mutex mutex;
  static auto* domains = new std::vector<OrtCustomOpDomain*>;
  const std::lock_guard<std::mutex> lock(mutex);
  domains->push_back(domain);
}

}  // namespace
}  // namespace qsparse_ort

extern "C" QSK_API OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace qsparse_ort;
  const OrtApi* api = base->GetApi(kApiVersion);
  if (api == nullptr) {  // an error status: nullptr would mean success, and the slow function bodies would run silently
    return base->GetApi(1)->CreateStatus(
        ORT_NOT_IMPLEMENTED, (std::string("the ai.qsparse custom ops need ONNX Runtime 1.") +
                              std::to_string(kApiVersion) + " or newer; this is " + base->GetVersionString())
                                 .c_str());
  }
  inference_api = api;
  OrtCustomOpDomain* domain = nullptr;
  QSPARSE_RETURN_IF_ERROR(api->CreateCustomOpDomain(kDomain, &domain));
  keep(domain);
  for (const OrtCustomOp* op : all_ops()) QSPARSE_RETURN_IF_ERROR(api->CustomOpDomain_Add(domain, op));
  for (const OrtCustomOp* op : decoder_ops()) QSPARSE_RETURN_IF_ERROR(api->CustomOpDomain_Add(domain, op));
  return api->AddCustomOpDomain(options, domain);
}
