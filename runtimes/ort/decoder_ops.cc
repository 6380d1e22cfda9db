// CachedAttention, GatedActivation and AddRmsNorm for ONNX Runtime: what stands between a layer's products.
#include <string>

#include "op_kernel.h"
#include "qsk/add_rms_norm.h"
#include "qsk/cached_attention.h"
#include "qsk/gated_activation.h"

namespace qsparse_ort {
namespace {

bool is_same(const Shape& a, const Shape& b) {
  if (a.rank != b.rank) return false;
  for (size_t i = 0; i < a.rank; ++i) {
    if (a.dims[i] != b.dims[i]) return false;
  }
  return true;
}

template <ONNXTensorElementDataType Type>
struct CachedAttentionKernel : Kernel {
  explicit CachedAttentionKernel(const OrtApi& ort_api) : Kernel(ort_api, kCachedAttention) {}

  OrtStatus* init(const OrtKernelInfo* info) {
    QSPARSE_RETURN_IF_ERROR(choose_variant());
    QSPARSE_RETURN_IF_ERROR(read_int(api, info, op_name(op), "heads", &heads));
    QSPARSE_RETURN_IF_ERROR(read_int(api, info, op_name(op), "kv_heads", &kv_heads));
    if (heads > 0 && kv_heads > 0 && heads % kv_heads == 0) return nullptr;
    return error(api, prefix(op) + "heads is " + std::to_string(heads) + " and kv_heads " + std::to_string(kv_heads) +
                          "; expected a positive multiple of a positive number");
  }

  OrtStatus* refuse(const char* name, const Shape& came, const std::string& expected) const {
    return error(api, prefix(op) + name + " is " + to_string(came) + "; expected " + expected);
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* context) {
    qsk_cached_attention_args args = {};
    Shape qkv, cosine, sine, visible, key, value;
    QSPARSE_RETURN_IF_ERROR(input_data(api, context, 0, &args.qkv, &qkv));
    QSPARSE_RETURN_IF_ERROR(input_data(api, context, 1, &args.cosine, &cosine));
    QSPARSE_RETURN_IF_ERROR(input_data(api, context, 2, &args.sine, &sine));
    QSPARSE_RETURN_IF_ERROR(input_data(api, context, 3, &args.visible, &visible));
    QSPARSE_RETURN_IF_ERROR(input_data(api, context, 4, &args.past_key, &key));
    QSPARSE_RETURN_IF_ERROR(input_data(api, context, 5, &args.past_value, &value));
    const int64_t all_heads = heads + 2 * kv_heads;
    if (qkv.rank != 3 || qkv.dims[2] % (2 * all_heads) != 0) {
      return refuse("qkv", qkv, "[batch, tokens, " + std::to_string(all_heads) + " * an even head width]");
    }
    args.type = kKernelType<Type>;
    args.batch = qkv.dims[0];
    args.tokens = qkv.dims[1];
    args.heads = heads;
    args.kv_heads = kv_heads;
    args.width = qkv.dims[2] / all_heads;
    const Shape angles = {{args.batch, args.tokens, args.width / 2}, 3, 0};
    if (!is_same(cosine, angles)) return refuse("cos", cosine, to_string(angles));
    if (!is_same(sine, angles)) return refuse("sin", sine, to_string(angles));
    if (visible.rank != 4 || visible.dims[3] < args.tokens) {
      return refuse("visible", visible, "[batch, 1, tokens, total]");
    }
    args.total = visible.dims[3];
    const Shape mask = {{args.batch, 1, args.tokens, args.total}, 4, 0};
    if (!is_same(visible, mask)) return refuse("visible", visible, to_string(mask));
    if (key.rank != 4 || key.dims[2] < args.total - args.tokens) {
      return refuse("past_key", key, "room for " + std::to_string(args.total - args.tokens) + " past tokens");
    }
    args.past_capacity = key.dims[2];
    Shape cache = {{args.batch, kv_heads, args.past_capacity, args.width}, 4, 0};
    if (!is_same(key, cache)) return refuse("past_key", key, to_string(cache));
    if (!is_same(value, cache)) return refuse("past_value", value, to_string(cache));
    if (cache.dims[2] < args.total) cache.dims[2] = args.total;
    const Shape result = {{args.batch, args.tokens, heads * args.width}, 3, 0};
    QSPARSE_RETURN_IF_ERROR(output_data(api, context, result, &args.y, 0));
    QSPARSE_RETURN_IF_ERROR(output_data(api, context, cache, &args.present_key, 1));
    QSPARSE_RETURN_IF_ERROR(output_data(api, context, cache, &args.present_value, 2));
    Pool pool(api, context);
    const int64_t scratch_bytes = qsk_cached_attention_scratch_bytes(&args, pool.parallel());
    const int status =
        qsk_cached_attention(variant, &args, pool.parallel(), thread_scratch(scratch_bytes), scratch_bytes);
    QSPARSE_RETURN_IF_ERROR(pool.take_status());
    count_call(op, variant);
    return kernel_error(api, op_name(op), status);
  }

  int64_t heads = 0;
  int64_t kv_heads = 0;
};

template <ONNXTensorElementDataType Type>
struct GatedActivationKernel : Kernel {
  explicit GatedActivationKernel(const OrtApi& ort_api) : Kernel(ort_api, kGatedActivation) {}

  OrtStatus* init(const OrtKernelInfo* info) {
    QSPARSE_RETURN_IF_ERROR(choose_variant());
    std::string name;
    QSPARSE_RETURN_IF_ERROR(read_string(api, info, op_name(op), "activation", &name));
    activation = name == "relu2" ? QSK_RELU2 : name == "silu" ? QSK_SILU : 0;
    if (activation != 0) return nullptr;
    return error(api, prefix(op) + "activation is \"" + name + "\"; expected \"relu2\" or \"silu\"");
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* context) {
    const void* x = nullptr;
    Shape shape;
    QSPARSE_RETURN_IF_ERROR(input_data(api, context, 0, &x, &shape));
    if (shape.rank == 0 || shape.dims[shape.rank - 1] % 2 != 0) {
      return error(api, prefix(op) + "x is " + to_string(shape) + "; expected [..., 2 * N]");
    }
    const int64_t n = shape.dims[shape.rank - 1] / 2;
    shape.dims[shape.rank - 1] = n;
    void* y = nullptr;
    QSPARSE_RETURN_IF_ERROR(output_data(api, context, shape, &y));
    const qsk_gated_activation_args args = {kKernelType<Type>,      activation,       x,
                                            static_cast<float*>(y), row_count(shape), n};
    Pool pool(api, context);
    const int64_t scratch_bytes = qsk_gated_activation_scratch_bytes(&args, pool.parallel());
    const int status =
        qsk_gated_activation(variant, &args, pool.parallel(), thread_scratch(scratch_bytes), scratch_bytes);
    QSPARSE_RETURN_IF_ERROR(pool.take_status());
    count_call(op, variant);
    return kernel_error(api, op_name(op), status);
  }

  int activation = 0;
};

template <ONNXTensorElementDataType Type>
struct AddRmsNormKernel : Kernel {
  explicit AddRmsNormKernel(const OrtApi& ort_api) : Kernel(ort_api, kAddRmsNorm) {}

  OrtStatus* init(const OrtKernelInfo* info) {
    QSPARSE_RETURN_IF_ERROR(choose_variant());
    QSPARSE_RETURN_IF_ERROR(weight.init(api, info));
    return read_float(api, info, op_name(op), "epsilon", &epsilon);
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* context) {
    qsk_add_rms_norm_args args = {};
    Shape shape, residual, weight_shape;
    QSPARSE_RETURN_IF_ERROR(input_data(api, context, 0, &args.x, &shape));
    QSPARSE_RETURN_IF_ERROR(input_data(api, context, 1, &args.residual, &residual));
    QSPARSE_RETURN_IF_ERROR(weight.read(api, context, &args.weight, &weight_shape));
    if (shape.rank == 0 || !is_same(shape, residual)) {
      return error(api, prefix(op) + "x is " + to_string(shape) + " and residual " + to_string(residual) +
                            "; expected the same shape [..., N]");
    }
    args.n = shape.dims[shape.rank - 1];
    if (weight_shape.rank != 1 || weight_shape.dims[0] != args.n) {
      return error(api,
                   prefix(op) + "weight is " + to_string(weight_shape) + "; expected [" + std::to_string(args.n) + "]");
    }
    args.type = kKernelType<Type>;
    args.rows = row_count(shape);
    args.epsilon = epsilon;
    QSPARSE_RETURN_IF_ERROR(output_data(api, context, shape, &args.sum, 0));
    QSPARSE_RETURN_IF_ERROR(output_data(api, context, shape, &args.y, 1));
    Pool pool(api, context);
    const int64_t scratch_bytes = qsk_add_rms_norm_scratch_bytes(&args, pool.parallel());
    const int status = qsk_add_rms_norm(variant, &args, pool.parallel(), thread_scratch(scratch_bytes), scratch_bytes);
    QSPARSE_RETURN_IF_ERROR(pool.take_status());
    count_call(op, variant);
    return kernel_error(api, op_name(op), status);
  }

  float epsilon = 0.0f;
  Weights weight = Weights(2);
};

template <ONNXTensorElementDataType Type>
struct CachedAttention : Ort::CustomOpBase<CachedAttention<Type>, CachedAttentionKernel<Type>, true> {
  CachedAttention() { this->version = kApiVersion; }
  OrtStatusPtr CreateKernelV2(const OrtApi& api, const OrtKernelInfo* info, void** kernel) const {
    return create<CachedAttentionKernel<Type>>(api, info, kernel);
  }
  const char* GetName() const { return op_name(kCachedAttention); }
  size_t GetInputTypeCount() const { return 6; }
  ONNXTensorElementDataType GetInputType(size_t position) const {
    return position == 3 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL : Type;
  }
  size_t GetOutputTypeCount() const { return 3; }
  ONNXTensorElementDataType GetOutputType(size_t) const { return Type; }
};

template <ONNXTensorElementDataType Type>
struct GatedActivation : Ort::CustomOpBase<GatedActivation<Type>, GatedActivationKernel<Type>, true> {
  GatedActivation() {
    this->version = kApiVersion;
    this->InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext* context) -> OrtStatusPtr {
      return infer_half_as_wide(*inference_api, context);
    };
  }
  OrtStatusPtr CreateKernelV2(const OrtApi& api, const OrtKernelInfo* info, void** kernel) const {
    return create<GatedActivationKernel<Type>>(api, info, kernel);
  }
  const char* GetName() const { return op_name(kGatedActivation); }
  size_t GetInputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetInputType(size_t) const { return Type; }
  size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetOutputType(size_t) const { return kFloat; }
};

template <ONNXTensorElementDataType Type>
struct AddRmsNorm : Ort::CustomOpBase<AddRmsNorm<Type>, AddRmsNormKernel<Type>, true> {
  AddRmsNorm() {
    this->version = kApiVersion;
    this->InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext* context) -> OrtStatusPtr {
      QSPARSE_RETURN_IF_ERROR(infer_same(*inference_api, context, 0));
      return infer_same(*inference_api, context, 1);
    };
  }
  OrtStatusPtr CreateKernelV2(const OrtApi& api, const OrtKernelInfo* info, void** kernel) const {
    return create<AddRmsNormKernel<Type>>(api, info, kernel);
  }
  const char* GetName() const { return op_name(kAddRmsNorm); }
  size_t GetInputTypeCount() const { return 3; }
  ONNXTensorElementDataType GetInputType(size_t) const { return Type; }
  size_t GetOutputTypeCount() const { return 2; }
  ONNXTensorElementDataType GetOutputType(size_t) const { return Type; }
};

}  // namespace

std::vector<const OrtCustomOp*> decoder_ops() {
  static const CachedAttention<kFloat> attention_float;
  static const CachedAttention<kHalf> attention_half;
  static const GatedActivation<kFloat> activation_float;
  static const GatedActivation<kHalf> activation_half;
  static const AddRmsNorm<kFloat> norm_float;
  static const AddRmsNorm<kHalf> norm_half;
  return {&attention_float, &attention_half, &activation_float, &activation_half, &norm_float, &norm_half};
}

}  // namespace qsparse_ort
