// TernaryMatMul and SparseTernaryMatMul for ONNX Runtime.
#include "op_kernel.h"
#include "qsk/sparse_ternary_matmul.h"
#include "qsk/ternary_matmul.h"

namespace qsparse_ort {
namespace {

template <ONNXTensorElementDataType Type>
struct TernaryMatMulKernel : Kernel {
  explicit TernaryMatMulKernel(const OrtApi& ort_api) : Kernel(ort_api, kTernaryMatMul) {}

  OrtStatus* init(const OrtKernelInfo* info) {
    QSPARSE_RETURN_IF_ERROR(choose_variant());
    QSPARSE_RETURN_IF_ERROR(weights.init_in_huge_pages(api, info));
    QSPARSE_RETURN_IF_ERROR(scale.init(api, info));
    QSPARSE_RETURN_IF_ERROR(read_int(api, info, op_name(op), "n", &n));
    if (n < 0) return error(api, prefix(op) + "n is " + std::to_string(n) + "; expected 0 or more");
    return weights.shape() == nullptr ? nullptr : check_weights(*weights.shape());
  }

  OrtStatus* check_weights(const Shape& shape) const {
    const int64_t row_bytes = qsk_ternary_row_bytes(n);
    if (shape.rank == 2 && shape.dims[1] == row_bytes) return nullptr;
    return error(api, prefix(op) + "w is " + to_string(shape) + "; " + std::to_string(n) + " outputs take [K, " +
                          std::to_string(row_bytes) + "]");
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* context) {
    const void* x = nullptr;
    const uint8_t* w = nullptr;
    const float* descale = nullptr;
    Shape shape, weights_shape, scale_shape;
    QSPARSE_RETURN_IF_ERROR(input_data(api, context, 0, &x, &shape));
    QSPARSE_RETURN_IF_ERROR(weights.read(api, context, &w, &weights_shape));
    QSPARSE_RETURN_IF_ERROR(scale.read(api, context, &descale, &scale_shape));
    QSPARSE_RETURN_IF_ERROR(check_weights(weights_shape));
    if (scale_shape.elements != 1) {
      return error(api, prefix(op) + "scale is " + to_string(scale_shape) + "; expected one element");
    }
    const int64_t k = weights_shape.dims[0];
    if (shape.rank == 0 || shape.dims[shape.rank - 1] != k) {
      return error(api, prefix(op) + "x is " + to_string(shape) + " but w is " + to_string(weights_shape) +
                            "; expected x as [..., " + std::to_string(k) + "]");
    }
    const int64_t m = row_count(shape);
    shape.dims[shape.rank - 1] = n;
    void* y = nullptr;
    QSPARSE_RETURN_IF_ERROR(output_data(api, context, shape, &y));
    const qsk_ternary_matmul_args args = {kKernelType<Type>, x, w, *descale, y, m, k, n};
    Pool pool(api, context);
    const int64_t scratch_bytes = qsk_ternary_matmul_scratch_bytes(&args, pool.parallel());
    const int status =
        qsk_ternary_matmul(variant, &args, pool.parallel(), thread_scratch(scratch_bytes), scratch_bytes);
    QSPARSE_RETURN_IF_ERROR(pool.take_status());
    count_call(op, variant);
    return kernel_error(api, op_name(op), status);
  }

  int64_t n = 0;
  Weights weights = Weights(1);
  Weights scale = Weights(2);
};

template <ONNXTensorElementDataType Type>
struct SparseTernaryMatMulKernel : Kernel {
  explicit SparseTernaryMatMulKernel(const OrtApi& ort_api) : Kernel(ort_api, kSparseTernaryMatMul) {}

  OrtStatus* init(const OrtKernelInfo* info) {
    QSPARSE_RETURN_IF_ERROR(choose_variant());
    QSPARSE_RETURN_IF_ERROR(weights.init_in_huge_pages(api, info));
    QSPARSE_RETURN_IF_ERROR(scales.init(api, info));
    QSPARSE_RETURN_IF_ERROR(selection.read(*this, info));
    QSPARSE_RETURN_IF_ERROR(list.read(*this, info));
    for (int64_t i = 0; i < list.matrices; ++i) row_bytes += qsk_ternary_row_bytes(list.n[i]);
    return nullptr;
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* context) {
    qsk_sparse_ternary_matmul_args args = {};
    Shape shape, weights_shape, scales_shape;
    QSPARSE_RETURN_IF_ERROR(input_data(api, context, 0, &args.x, &shape));
    QSPARSE_RETURN_IF_ERROR(weights.read(api, context, &args.w, &weights_shape));
    QSPARSE_RETURN_IF_ERROR(scales.read(api, context, &args.scales, &scales_shape));
    QSPARSE_RETURN_IF_ERROR(selection.check(*this, shape));
    const int64_t k = shape.dims[shape.rank - 1];
    if (weights_shape.rank != 2 || weights_shape.dims[0] != k || weights_shape.dims[1] != row_bytes) {
      return error(api, prefix(op) + "x is " + to_string(shape) + " and w is " + to_string(weights_shape) +
                            "; expected w as [" + std::to_string(k) + ", " + std::to_string(row_bytes) + "]");
    }
    if (scales_shape.rank != 1 || scales_shape.dims[0] != list.matrices) {
      return error(api, prefix(op) + "scales is " + to_string(scales_shape) + "; expected [" +
                            std::to_string(list.matrices) + "], one for each entry of n");
    }
    args.type = kKernelType<Type>;
    args.n = list.n;
    args.matrices = list.matrices;
    args.m = row_count(shape);
    args.k = k;
    args.top_k = selection.k;
    args.block = selection.block;
    args.rescale_l2 = selection.rescale_l2;
    shape.dims[shape.rank - 1] = list.outputs;
    QSPARSE_RETURN_IF_ERROR(output_data(api, context, shape, &args.y));
    Pool pool(api, context);
    const int64_t scratch_bytes = qsk_sparse_ternary_matmul_scratch_bytes(&args, pool.parallel());
    const int status =
        qsk_sparse_ternary_matmul(variant, &args, pool.parallel(), thread_scratch(scratch_bytes), scratch_bytes);
    QSPARSE_RETURN_IF_ERROR(pool.take_status());
    count_call(op, variant);
    return kernel_error(api, op_name(op), status);
  }

  Selection selection;
  OutputList list;
  int64_t row_bytes = 0;
  Weights weights = Weights(1);
  Weights scales = Weights(2);
};

template <Op kName, OrtOpAttrType kOutputs, typename KernelType, ONNXTensorElementDataType Type>
struct Traits {
  using Kernel = KernelType;
  static constexpr Op kOp = kName;
  static constexpr ONNXTensorElementDataType kInputs[] = {Type, ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, kFloat};
  static constexpr ONNXTensorElementDataType kOutput = Type;
  static OrtStatus* infer(OrtShapeInferContext* context) {
    int64_t n = 0;
    QSPARSE_RETURN_IF_ERROR(sum_of_outputs(*inference_api, context, kOutputs, &n));
    return infer_like_x(*inference_api, context, n);
  }
};

template <ONNXTensorElementDataType Type>
using TernaryMatMul = OneOutputOp<Traits<kTernaryMatMul, ORT_OP_ATTR_INT, TernaryMatMulKernel<Type>, Type>>;
template <ONNXTensorElementDataType Type>
using SparseTernaryMatMul =
    OneOutputOp<Traits<kSparseTernaryMatMul, ORT_OP_ATTR_INTS, SparseTernaryMatMulKernel<Type>, Type>>;

}  // namespace

std::vector<const OrtCustomOp*> ternary_ops() {
  static const TernaryMatMul<kFloat> of_float;
  static const TernaryMatMul<kHalf> of_half;
  static const SparseTernaryMatMul<kFloat> sparse_of_float;
  static const SparseTernaryMatMul<kHalf> sparse_of_half;
  return {&of_float, &of_half, &sparse_of_float, &sparse_of_half};
}

}  // namespace qsparse_ort
