// DenseMatMulNBits and GatherNBits for ONNX Runtime: the n-bit head, and the embedding that may be tied to it.
#include "op_kernel.h"
#include "qsk/dense_matmul_nbits.h"

namespace qsparse_ort {
namespace {

constexpr ONNXTensorElementDataType kBytes = ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
constexpr ONNXTensorElementDataType kIds = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;

struct NBitsKernel : Kernel {
  using Kernel::Kernel;

  OrtStatus* init(const OrtKernelInfo* info) {
    QSPARSE_RETURN_IF_ERROR(choose_variant());
    QSPARSE_RETURN_IF_ERROR(read_int(api, info, op_name(op), "k", &k));
    QSPARSE_RETURN_IF_ERROR(read_int(api, info, op_name(op), "bits", &bits));
    QSPARSE_RETURN_IF_ERROR(read_int(api, info, op_name(op), "group", &group));
    if ((bits == 4 || bits == 8) && group >= 1 && k >= 0) return nullptr;
    return error(api, prefix(op) + "bits is " + std::to_string(bits) + ", group " + std::to_string(group) + ", k " +
                          std::to_string(k) + "; expected 4 or 8, a positive group and a width");
  }

  // Weights and scales of `rows` rows (any number for -1); `rows` is then what they have.
  OrtStatus* read_weights(const OrtKernelContext* context, const uint8_t** w, const uint16_t** scales,
                          int64_t* rows) const {
    Shape weights, scale_shape;
    QSPARSE_RETURN_IF_ERROR(weights_input.read(api, context, w, &weights));
    QSPARSE_RETURN_IF_ERROR(scales_input.read(api, context, scales, &scale_shape));
    const int64_t row_bytes = qsk_dense_row_bytes(k, bits), groups = (k + group - 1) / group;
    const int64_t expected = *rows >= 0 ? *rows : weights.rank == 2 ? weights.dims[0] : 0;
    *rows = expected;
    if (weights.rank == 2 && weights.dims[0] == expected && weights.dims[1] == row_bytes && scale_shape.rank == 2 &&
        scale_shape.dims[0] == expected && scale_shape.dims[1] == groups) {
      return nullptr;
    }
    return error(api, prefix(op) + "w is " + to_string(weights) + " and scales " + to_string(scale_shape) +
                          "; expected [" + std::to_string(expected) + ", " + std::to_string(row_bytes) + "] and [" +
                          std::to_string(expected) + ", " + std::to_string(groups) + "]");
  }

  int64_t k = 0, bits = 0, group = 0;
  Weights weights_input = Weights(1);
  Weights scales_input = Weights(2);
};

template <ONNXTensorElementDataType Type>
struct DenseMatMulKernel : NBitsKernel {
  explicit DenseMatMulKernel(const OrtApi& ort_api) : NBitsKernel(ort_api, kDenseMatMulNBits) {}

  OrtStatus* init(const OrtKernelInfo* info) {
    QSPARSE_RETURN_IF_ERROR(NBitsKernel::init(info));
    QSPARSE_RETURN_IF_ERROR(weights_input.init_in_huge_pages(api, info));
    QSPARSE_RETURN_IF_ERROR(scales_input.init_in_huge_pages(api, info));
    QSPARSE_RETURN_IF_ERROR(read_int(api, info, op_name(op), "n", &n));
    return n >= 0 ? nullptr : error(api, prefix(op) + "n is " + std::to_string(n) + "; expected 0 or more");
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* context) {
    qsk_dense_matmul_nbits_args args = {};
    Shape shape;
    QSPARSE_RETURN_IF_ERROR(input_data(api, context, 0, &args.x, &shape));
    if (shape.rank == 0 || shape.dims[shape.rank - 1] != k) {
      return error(api, prefix(op) + "x is " + to_string(shape) + "; expected [..., " + std::to_string(k) + "]");
    }
    args.n = n;
    QSPARSE_RETURN_IF_ERROR(read_weights(context, &args.w, &args.scales, &args.n));
    args.type = kKernelType<Type>;
    args.m = row_count(shape);
    args.k = k;
    args.bits = bits;
    args.group = group;
    shape.dims[shape.rank - 1] = n;
    QSPARSE_RETURN_IF_ERROR(output_data(api, context, shape, &args.y));
    Pool pool(api, context);
    const int64_t scratch_bytes = qsk_dense_matmul_nbits_scratch_bytes(&args, pool.parallel());
    const int status =
        qsk_dense_matmul_nbits(variant, &args, pool.parallel(), thread_scratch(scratch_bytes), scratch_bytes);
    QSPARSE_RETURN_IF_ERROR(pool.take_status());
    count_call(op, variant);
    return kernel_error(api, op_name(op), status);
  }

  int64_t n = 0;
};

struct GatherKernel : NBitsKernel {
  explicit GatherKernel(const OrtApi& ort_api) : NBitsKernel(ort_api, kGatherNBits) {}

  OrtStatus* init(const OrtKernelInfo* info) {
    QSPARSE_RETURN_IF_ERROR(NBitsKernel::init(info));
    QSPARSE_RETURN_IF_ERROR(weights_input.init(api, info));
    return scales_input.init(api, info);
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* context) {
    qsk_gather_nbits_args args = {};
    Shape shape;
    QSPARSE_RETURN_IF_ERROR(input_data(api, context, 0, &args.ids, &shape));
    args.n = -1;
    QSPARSE_RETURN_IF_ERROR(read_weights(context, &args.w, &args.scales, &args.n));
    if (shape.rank == Shape::kMostDims)
      return error(api, prefix(op) + "ids have 16 dimensions; at most 15 are supported");
    args.count = shape.elements;
    args.k = k;
    args.bits = bits;
    args.group = group;
    shape.dims[shape.rank++] = k;
    QSPARSE_RETURN_IF_ERROR(output_data(api, context, shape, &args.y));
    const int status = qsk_gather_nbits(variant, &args, nullptr, nullptr, 0);
    count_call(op, variant);
    if (status == QSK_BAD_INDEX) {
      return error(api, prefix(op) + "an id is outside 0.." + std::to_string(args.n - 1));
    }
    return kernel_error(api, op_name(op), status);
  }
};

template <ONNXTensorElementDataType Type>
struct DenseTraits {
  using Kernel = DenseMatMulKernel<Type>;
  static constexpr Op kOp = kDenseMatMulNBits;
  static constexpr ONNXTensorElementDataType kInputs[] = {Type, kBytes, kHalf};
  static constexpr ONNXTensorElementDataType kOutput = Type;
  static OrtStatus* infer(OrtShapeInferContext* context) {
    int64_t n = 0;
    QSPARSE_RETURN_IF_ERROR(sum_of_outputs(*inference_api, context, ORT_OP_ATTR_INT, &n));
    return infer_like_x(*inference_api, context, n);
  }
};

struct GatherTraits {
  using Kernel = GatherKernel;
  static constexpr Op kOp = kGatherNBits;
  static constexpr ONNXTensorElementDataType kInputs[] = {kIds, kBytes, kHalf};
  static constexpr ONNXTensorElementDataType kOutput = kFloat;
  static OrtStatus* infer(OrtShapeInferContext* context) { return infer_rows(*inference_api, context, kFloat); }
};

}  // namespace

std::vector<const OrtCustomOp*> head_ops() {
  static const OneOutputOp<DenseTraits<kFloat>> dense_of_float;
  static const OneOutputOp<DenseTraits<kHalf>> dense_of_half;
  static const OneOutputOp<GatherTraits> gather;
  return {&dense_of_float, &dense_of_half, &gather};
}

}  // namespace qsparse_ort
