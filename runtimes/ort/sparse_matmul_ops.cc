// SparseMatMul and SparseMatMulNBits for ONNX Runtime: one kernel, float or integer weights.
#include "op_kernel.h"
#include "qsk/sparse_matmul.h"

namespace qsparse_ort {
namespace {

constexpr ONNXTensorElementDataType kInt8 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
constexpr ONNXTensorElementDataType kInt4 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT4;

template <ONNXTensorElementDataType Weight>
constexpr int kWeightType = Weight == kInt4    ? QSK_INT4
                            : Weight == kInt8  ? QSK_INT8
                            : Weight == kFloat ? QSK_FLOAT32
                                               : QSK_FLOAT16;
template <ONNXTensorElementDataType Weight>
constexpr bool kIsInteger = Weight == kInt4 || Weight == kInt8;

template <ONNXTensorElementDataType Type, ONNXTensorElementDataType Weight>
struct SparseMatMulKernel : Kernel {
  explicit SparseMatMulKernel(const OrtApi& ort_api)
      : Kernel(ort_api, kIsInteger<Weight> ? kSparseMatMulNBits : kSparseMatMul) {}

  OrtStatus* init(const OrtKernelInfo* info) {
    QSPARSE_RETURN_IF_ERROR(choose_variant());
    QSPARSE_RETURN_IF_ERROR(w.init_in_huge_pages(api, info));
    QSPARSE_RETURN_IF_ERROR(selection.read(*this, info));
    QSPARSE_RETURN_IF_ERROR(list.read(*this, info));
    for (int64_t i = 0; i < list.matrices; ++i) columns += qsk_sparse_matmul_columns(kWeightType<Weight>, list.n[i]);
    if constexpr (kIsInteger<Weight>) {
      int64_t bits = 0;
      QSPARSE_RETURN_IF_ERROR(read_int(api, info, op_name(op), "bits", &bits));
      QSPARSE_RETURN_IF_ERROR(read_int(api, info, op_name(op), "group", &group));
      if (bits != (Weight == kInt4 ? 4 : 8)) {
        return error(api, prefix(op) + "bits is " + std::to_string(bits) + " but w is int" +
                              (Weight == kInt4 ? "4" : "8") + "; expected the same");
      }
      if (group < 1) {
        return error(api, prefix(op) + "group is " + std::to_string(group) + "; expected 1 or more");
      }
      return scales.init_in_huge_pages(api, info);
    }
    return nullptr;
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* context) {
    qsk_sparse_matmul_args args = {};
    Shape shape, weights;
    QSPARSE_RETURN_IF_ERROR(input_data(api, context, 0, &args.x, &shape));
    QSPARSE_RETURN_IF_ERROR(w.read(api, context, &args.w, &weights));
    QSPARSE_RETURN_IF_ERROR(selection.check(*this, shape));
    args.k = shape.dims[shape.rank - 1];
    if (weights.rank != 2 || weights.dims[0] != args.k || weights.dims[1] != columns) {
      return error(api, prefix(op) + "x is " + to_string(shape) + " and w is " + to_string(weights) +
                            "; expected w as [" + std::to_string(args.k) + ", " + std::to_string(columns) + "]");
    }
    if constexpr (kIsInteger<Weight>) {
      Shape scale_shape;
      QSPARSE_RETURN_IF_ERROR(scales.read(api, context, &args.scales, &scale_shape));
      const int64_t groups = (args.k + group - 1) / group;
      if (scale_shape.rank != 2 || scale_shape.dims[0] != groups || scale_shape.dims[1] != columns) {
        return error(api, prefix(op) + "scales is " + to_string(scale_shape) + "; expected [" + std::to_string(groups) +
                              ", " + std::to_string(columns) + "]");
      }
    }
    args.type = kKernelType<Type>;
    args.weight_type = kWeightType<Weight>;
    args.group = group;
    args.n = list.n;
    args.matrices = list.matrices;
    args.m = row_count(shape);
    args.top_k = selection.k;
    args.block = selection.block;
    args.rescale_l2 = selection.rescale_l2;
    shape.dims[shape.rank - 1] = list.outputs;
    QSPARSE_RETURN_IF_ERROR(output_data(api, context, shape, &args.y));
    Pool pool(api, context);
    const int64_t scratch_bytes = qsk_sparse_matmul_scratch_bytes(&args, pool.parallel());
    const int status = qsk_sparse_matmul(variant, &args, pool.parallel(), thread_scratch(scratch_bytes), scratch_bytes);
    QSPARSE_RETURN_IF_ERROR(pool.take_status());
    count_call(op, variant);
    return kernel_error(api, op_name(op), status);
  }

  Selection selection;
  OutputList list;
  int64_t columns = 0;
  int64_t group = 0;
  Weights w = Weights(1);
  Weights scales = Weights(2);
};

OrtStatus* infer_joined(OrtShapeInferContext* context) {
  int64_t n = 0;
  QSPARSE_RETURN_IF_ERROR(sum_of_outputs(*inference_api, context, ORT_OP_ATTR_INTS, &n));
  return infer_like_x(*inference_api, context, n);
}

template <ONNXTensorElementDataType Type, ONNXTensorElementDataType Weight>
struct FloatTraits {
  using Kernel = SparseMatMulKernel<Type, Weight>;
  static constexpr Op kOp = kSparseMatMul;
  static constexpr ONNXTensorElementDataType kInputs[] = {Type, Weight};
  static constexpr ONNXTensorElementDataType kOutput = Type;
  static OrtStatus* infer(OrtShapeInferContext* context) { return infer_joined(context); }
};

template <ONNXTensorElementDataType Type, ONNXTensorElementDataType Weight>
struct NBitsTraits {
  using Kernel = SparseMatMulKernel<Type, Weight>;
  static constexpr Op kOp = kSparseMatMulNBits;
  static constexpr ONNXTensorElementDataType kInputs[] = {Type, Weight, kHalf};
  static constexpr ONNXTensorElementDataType kOutput = Type;
  static OrtStatus* infer(OrtShapeInferContext* context) { return infer_joined(context); }
};

}  // namespace

std::vector<const OrtCustomOp*> sparse_matmul_ops() {
  static const OneOutputOp<FloatTraits<kFloat, kFloat>> of_float;
  static const OneOutputOp<FloatTraits<kHalf, kHalf>> of_half;
  static const OneOutputOp<NBitsTraits<kFloat, kInt4>> int4_of_float;
  static const OneOutputOp<NBitsTraits<kHalf, kInt4>> int4_of_half;
  static const OneOutputOp<NBitsTraits<kFloat, kInt8>> int8_of_float;
  static const OneOutputOp<NBitsTraits<kHalf, kInt8>> int8_of_half;
  return {&of_float, &of_half, &int4_of_float, &int4_of_half, &int8_of_float, &int8_of_half};
}

}  // namespace qsparse_ort
