// The kernels as custom ops of ONNX Runtime's CUDA execution provider, domain "ai.qsparse": they read attributes, check
// shapes and enqueue on the stream of the session. Scratch comes from the provider's arena, which hands a freed piece
// only to work that is behind this one on the same stream.
#include "op_kernel.h"
#include "qsk_cuda.h"

#ifndef QSPARSE_CUDA_PROVIDER  // the tests put the emulated kernels on the CPU
#define QSPARSE_CUDA_PROVIDER "CUDAExecutionProvider"
#endif

namespace qsparse_ort {
namespace {

constexpr ONNXTensorElementDataType kBytes = ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
constexpr ONNXTensorElementDataType kInt8 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
constexpr ONNXTensorElementDataType kInt4 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT4;

// What the kernels here have in common: the device, and the way to its stream.
struct CudaKernel : Kernel {
  using Kernel::Kernel;
  CudaKernel(const CudaKernel&) = delete;
  CudaKernel& operator=(const CudaKernel&) = delete;
  ~CudaKernel() {
    if (allocator != nullptr) api.ReleaseAllocator(allocator);
  }

  OrtStatus* init_device(const OrtKernelInfo* info) {
    multiprocessors = qsk_cuda_multiprocessors();
    if (multiprocessors < 1) return error(api, prefix(op) + "no CUDA device answers; look at nvidia-smi");
    return api.KernelInfoGetAllocator(info, OrtMemTypeDefault, &allocator);
  }

  template <typename Args>
  OrtStatus* enqueue(OrtKernelContext* context, const Args& args,
                     int64_t (*scratch_bytes)(const Args*, const qsk_cuda_queue*),
                     int (*run)(const Args*, const qsk_cuda_queue*, void*, int64_t)) const {
    qsk_cuda_queue queue = {nullptr, multiprocessors};
    QSPARSE_RETURN_IF_ERROR(api.KernelContext_GetGPUComputeStream(context, &queue.stream));
    const int64_t bytes = scratch_bytes(&args, &queue);
    void* scratch = nullptr;
    if (bytes > 0) {
      const OrtMemoryInfo* memory = nullptr;
      QSPARSE_RETURN_IF_ERROR(api.AllocatorGetInfo(allocator, &memory));
      QSPARSE_RETURN_IF_ERROR(
          api.KernelContext_GetScratchBuffer(context, memory, static_cast<size_t>(bytes), &scratch));
    }
    const int status = run(&args, &queue, scratch, bytes);
    if (scratch != nullptr) QSPARSE_RETURN_IF_ERROR(api.AllocatorFree(allocator, scratch));
    if (status == QSK_CUDA_LAUNCH_FAILED) return error(api, prefix(op) + "CUDA refused the launch of a kernel");
    if (status == QSK_CUDA_MISALIGNED) return error(api, prefix(op) + "w is not aligned to 4 bytes");
    if (status == QSK_OK) count_cuda_call(op);
    return kernel_error(api, op_name(op), status);
  }

  OrtAllocator* allocator = nullptr;
  int64_t multiprocessors = 0;
};

template <ONNXTensorElementDataType Type>
struct TopKKernel : CudaKernel {
  explicit TopKKernel(const OrtApi& ort_api) : CudaKernel(ort_api, kTopKSparsify) {}

  OrtStatus* init(const OrtKernelInfo* info) {
    QSPARSE_RETURN_IF_ERROR(init_device(info));
    return selection.read(*this, info);
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* context) {
    qsk_topk_sparsify_args args = {};
    Shape shape;
    QSPARSE_RETURN_IF_ERROR(input_data(api, context, 0, &args.x, &shape));
    QSPARSE_RETURN_IF_ERROR(selection.check(*this, shape));
    QSPARSE_RETURN_IF_ERROR(output_data(api, context, shape, &args.y));
    args.type = kKernelType<Type>;
    args.width = shape.dims[shape.rank - 1];
    args.rows = row_count(shape);
    args.k = selection.k;
    args.block = selection.block;
    args.rescale_l2 = selection.rescale_l2;
    return enqueue(context, args, qsk_cuda_topk_sparsify_scratch_bytes, qsk_cuda_topk_sparsify);
  }

  Selection selection;
};

// TernaryMatMul, which has one matrix and selects nothing, or SparseTernaryMatMul.
template <Op kName, ONNXTensorElementDataType Type>
struct TernaryKernel : CudaKernel {
  explicit TernaryKernel(const OrtApi& ort_api) : CudaKernel(ort_api, kName) {}

  OrtStatus* init(const OrtKernelInfo* info) {
    QSPARSE_RETURN_IF_ERROR(init_device(info));
    if constexpr (kName == kSparseTernaryMatMul) {
      QSPARSE_RETURN_IF_ERROR(selection.read(*this, info));
      QSPARSE_RETURN_IF_ERROR(list.read(*this, info));
    } else {
      QSPARSE_RETURN_IF_ERROR(read_int(api, info, op_name(op), "n", list.n));
      if (list.n[0] < 0) return error(api, prefix(op) + "n is " + std::to_string(list.n[0]) + "; expected 0 or more");
      list.matrices = 1;
      list.outputs = list.n[0];
    }
    for (int64_t i = 0; i < list.matrices; ++i) row_bytes += (list.n[i] + 127) / 128 * 32;
    return nullptr;
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* context) {
    qsk_sparse_ternary_matmul_args args = {};
    Shape shape, weights, scales;
    QSPARSE_RETURN_IF_ERROR(input_data(api, context, 0, &args.x, &shape));
    QSPARSE_RETURN_IF_ERROR(input_data(api, context, 1, &args.w, &weights));
    QSPARSE_RETURN_IF_ERROR(input_data(api, context, 2, &args.scales, &scales));
    QSPARSE_RETURN_IF_ERROR(selection.check(*this, shape));
    args.k = shape.dims[shape.rank - 1];
    if (weights.rank != 2 || weights.dims[0] != args.k || weights.dims[1] != row_bytes) {
      return error(api, prefix(op) + "x is " + to_string(shape) + " and w is " + to_string(weights) +
                            "; expected w as [" + std::to_string(args.k) + ", " + std::to_string(row_bytes) + "]");
    }
    if (scales.rank != 1 || scales.dims[0] != list.matrices) {
      return error(api, prefix(op) + "scales is " + to_string(scales) + "; expected [" + std::to_string(list.matrices) +
                            "], one for each matrix");
    }
    args.type = kKernelType<Type>;
    args.n = list.n;
    args.matrices = list.matrices;
    args.m = row_count(shape);
    args.top_k = kName == kSparseTernaryMatMul ? selection.k : args.k;
    args.block = selection.block;
    args.rescale_l2 = selection.rescale_l2;
    shape.dims[shape.rank - 1] = list.outputs;
    QSPARSE_RETURN_IF_ERROR(output_data(api, context, shape, &args.y));
    return enqueue(context, args, qsk_cuda_sparse_ternary_matmul_scratch_bytes, qsk_cuda_sparse_ternary_matmul);
  }

  Selection selection;
  OutputList list;
  int64_t row_bytes = 0;
};

template <ONNXTensorElementDataType Type, ONNXTensorElementDataType Weight>
struct NBitsKernel : CudaKernel {
  explicit NBitsKernel(const OrtApi& ort_api) : CudaKernel(ort_api, kSparseMatMulNBits) {}

  OrtStatus* init(const OrtKernelInfo* info) {
    QSPARSE_RETURN_IF_ERROR(init_device(info));
    QSPARSE_RETURN_IF_ERROR(selection.read(*this, info));
    QSPARSE_RETURN_IF_ERROR(list.read(*this, info));
    int64_t bits = 0;
    QSPARSE_RETURN_IF_ERROR(read_int(api, info, op_name(op), "bits", &bits));
    QSPARSE_RETURN_IF_ERROR(read_int(api, info, op_name(op), "group", &group));
    const int64_t expected = Weight == kInt4 ? 4 : 8;
    if (bits != expected) {
      return error(api, prefix(op) + "bits is " + std::to_string(bits) + " but w is int" + std::to_string(expected) +
                            "; expected the same");
    }
    if (group < 1) return error(api, prefix(op) + "group is " + std::to_string(group) + "; expected 1 or more");
    for (int64_t i = 0; i < list.matrices; ++i) {
      columns += (list.n[i] + QSK_NBITS_TILE_OUTPUTS - 1) / QSK_NBITS_TILE_OUTPUTS * QSK_NBITS_TILE_OUTPUTS;
    }
    return nullptr;
  }

  OrtStatusPtr ComputeV2(OrtKernelContext* context) {
    qsk_sparse_matmul_args args = {};
    Shape shape, weights, scales;
    QSPARSE_RETURN_IF_ERROR(input_data(api, context, 0, &args.x, &shape));
    QSPARSE_RETURN_IF_ERROR(input_data(api, context, 1, &args.w, &weights));
    QSPARSE_RETURN_IF_ERROR(input_data(api, context, 2, &args.scales, &scales));
    QSPARSE_RETURN_IF_ERROR(selection.check(*this, shape));
    args.k = shape.dims[shape.rank - 1];
    const int64_t groups = (args.k + group - 1) / group;
    if (weights.rank != 2 || weights.dims[0] != args.k || weights.dims[1] != columns || scales.rank != 2 ||
        scales.dims[0] != groups || scales.dims[1] != columns) {
      return error(api, prefix(op) + "x is " + to_string(shape) + ", w is " + to_string(weights) + " and scales is " +
                            to_string(scales) + "; expected w as [" + std::to_string(args.k) + ", " +
                            std::to_string(columns) + "] and scales as [" + std::to_string(groups) + ", " +
                            std::to_string(columns) + "]");
    }
    args.type = kKernelType<Type>;
    args.weight_type = Weight == kInt4 ? QSK_INT4 : QSK_INT8;
    args.group = group;
    args.n = list.n;
    args.matrices = list.matrices;
    args.m = row_count(shape);
    args.top_k = selection.k;
    args.block = selection.block;
    args.rescale_l2 = selection.rescale_l2;
    shape.dims[shape.rank - 1] = list.outputs;
    QSPARSE_RETURN_IF_ERROR(output_data(api, context, shape, &args.y));
    return enqueue(context, args, qsk_cuda_sparse_matmul_scratch_bytes, qsk_cuda_sparse_matmul);
  }

  Selection selection;
  OutputList list;
  int64_t columns = 0;
  int64_t group = 0;
};

template <ONNXTensorElementDataType Type>
struct TopKTraits {
  using Kernel = TopKKernel<Type>;
  static constexpr Op kOp = kTopKSparsify;
  static constexpr ONNXTensorElementDataType kInputs[] = {Type};
  static constexpr ONNXTensorElementDataType kOutput = Type;
  static OrtStatus* infer(OrtShapeInferContext* context) { return infer_like_x(*inference_api, context, -1); }
};

OrtStatus* infer_outputs(OrtShapeInferContext* context, OrtOpAttrType type) {
  int64_t n = 0;
  QSPARSE_RETURN_IF_ERROR(sum_of_outputs(*inference_api, context, type, &n));
  return infer_like_x(*inference_api, context, n);
}

template <Op kName, ONNXTensorElementDataType Type>
struct TernaryTraits {
  using Kernel = TernaryKernel<kName, Type>;
  static constexpr Op kOp = kName;
  static constexpr ONNXTensorElementDataType kInputs[] = {Type, kBytes, kFloat};
  static constexpr ONNXTensorElementDataType kOutput = Type;
  static OrtStatus* infer(OrtShapeInferContext* context) {
    return infer_outputs(context, kName == kSparseTernaryMatMul ? ORT_OP_ATTR_INTS : ORT_OP_ATTR_INT);
  }
};

template <ONNXTensorElementDataType Type, ONNXTensorElementDataType Weight>
struct NBitsTraits {
  using Kernel = NBitsKernel<Type, Weight>;
  static constexpr Op kOp = kSparseMatMulNBits;
  static constexpr ONNXTensorElementDataType kInputs[] = {Type, Weight, kHalf};
  static constexpr ONNXTensorElementDataType kOutput = Type;
  static OrtStatus* infer(OrtShapeInferContext* context) { return infer_outputs(context, ORT_OP_ATTR_INTS); }
};

template <typename Traits>
struct CudaOp : Ort::CustomOpBase<CudaOp<Traits>, typename Traits::Kernel, true> {
  CudaOp() {
    this->version = kApiVersion;
    this->InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext* context) -> OrtStatusPtr {
      return Traits::infer(context);
    };
  }
  OrtStatusPtr CreateKernelV2(const OrtApi& api, const OrtKernelInfo* info, void** kernel) const {
    return create<typename Traits::Kernel>(api, info, kernel);
  }
  const char* GetExecutionProviderType() const { return QSPARSE_CUDA_PROVIDER; }
  const char* GetName() const { return op_name(Traits::kOp); }
  size_t GetInputTypeCount() const { return sizeof Traits::kInputs / sizeof *Traits::kInputs; }
  ONNXTensorElementDataType GetInputType(size_t position) const { return Traits::kInputs[position]; }
  size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetOutputType(size_t) const { return Traits::kOutput; }
};

}  // namespace

std::vector<const OrtCustomOp*> cuda_ops() {
  static const CudaOp<TopKTraits<kFloat>> topk_of_float;
  static const CudaOp<TopKTraits<kHalf>> topk_of_half;
  static const CudaOp<TernaryTraits<kTernaryMatMul, kFloat>> ternary_of_float;
  static const CudaOp<TernaryTraits<kTernaryMatMul, kHalf>> ternary_of_half;
  static const CudaOp<TernaryTraits<kSparseTernaryMatMul, kFloat>> sparse_of_float;
  static const CudaOp<TernaryTraits<kSparseTernaryMatMul, kHalf>> sparse_of_half;
  static const CudaOp<NBitsTraits<kFloat, kInt4>> int4_of_float;
  static const CudaOp<NBitsTraits<kHalf, kInt4>> int4_of_half;
  static const CudaOp<NBitsTraits<kFloat, kInt8>> int8_of_float;
  static const CudaOp<NBitsTraits<kHalf, kInt8>> int8_of_half;
  return {&topk_of_float,  &topk_of_half,  &ternary_of_float, &ternary_of_half, &sparse_of_float,
          &sparse_of_half, &int4_of_float, &int4_of_half,     &int8_of_float,   &int8_of_half};
}

}  // namespace qsparse_ort
