#include "op_kernel.h"

namespace qsparse_ort {
namespace {

// Of a type that weights have; 0 for others.
size_t bits_of(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
      return 32;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
      return 16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8:
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8:
      return 8;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT4:
      return 4;
    default:
      return 0;
  }
}

}  // namespace

const OrtApi* inference_api = nullptr;

std::string prefix(Op op) { return std::string("ai.qsparse:") + op_name(op) + ": "; }

OrtStatus* Selection::read(const Kernel& kernel, const OrtKernelInfo* info) {
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

OrtStatus* Selection::check(const Kernel& kernel, const Shape& x) const {
  if (x.rank == 0) return error(kernel.api, prefix(kernel.op) + "x is a scalar; expected [..., K]");
  const int64_t width = x.dims[x.rank - 1];
  if (block > 0 || k <= width) return nullptr;
  return error(kernel.api, prefix(kernel.op) + "k is " + std::to_string(k) + " but x is " + to_string(x) +
                               "; expected 0.." + std::to_string(width));
}

OrtStatus* OutputList::read(const Kernel& kernel, const OrtKernelInfo* info) {
  size_t count = 0;
  QSPARSE_RETURN_IF_ERROR(read_ints(kernel.api, info, op_name(kernel.op), "n", n, QSK_MOST_MATRICES, &count));
  matrices = static_cast<int64_t>(count);
  for (int64_t i = 0; i < matrices; ++i) {
    if (n[i] < 0) {
      return error(kernel.api, prefix(kernel.op) + "n has the entry " + std::to_string(n[i]) + "; expected 0 or more");
    }
    outputs += n[i];
  }
  return nullptr;
}

OrtStatus* Weights::init(const OrtApi& api, const OrtKernelInfo* info) {
  int is_constant = 0;
  const OrtValue* value = nullptr;
  QSPARSE_RETURN_IF_ERROR(api.KernelInfoGetConstantInput_tensor(info, position_, &is_constant, &value));
  if (!is_constant) return nullptr;
  OrtTensorTypeAndShapeInfo* type = nullptr;
  QSPARSE_RETURN_IF_ERROR(api.GetTensorTypeAndShape(value, &type));
  ONNXTensorElementDataType element = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  OrtStatus* status = api.GetTensorElementType(type, &element);
  api.ReleaseTensorTypeAndShapeInfo(type);
  if (status != nullptr) return status;
  QSPARSE_RETURN_IF_ERROR(shape_of(api, value, &shape_));
  void* data = nullptr;  // the API has no read-only access
  QSPARSE_RETURN_IF_ERROR(api.GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  data_ = data;
  bytes_ = (static_cast<size_t>(shape_.elements) * bits_of(element) + 7) / 8;
  is_constant_ = true;
  return nullptr;
}

OrtStatus* Weights::init_in_huge_pages(const OrtApi& api, const OrtKernelInfo* info) {
  QSPARSE_RETURN_IF_ERROR(init(api, info));
  copy_ = in_huge_pages(data_, bytes_);
  if (copy_ != nullptr) data_ = copy_.get();
  return nullptr;
}

int64_t row_count(const Shape& x) {
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < x.rank; ++i) rows *= x.dims[i];
  return rows;
}

namespace {

// One more dimension than the first input, or the same number.
enum class Rank { kSame, kOneMore };

// The output has the shape of the first input, but for its last dimension, where that is not negative; and its type,
// where that is defined. In C calls: the C++ wrapper of API 21 to 23 throws on a symbolic dimension.
OrtStatus* infer(const OrtApi& api, OrtShapeInferContext* context, Rank change, int64_t last,
                 ONNXTensorElementDataType type, size_t position = 0) {
  OrtTensorTypeAndShapeInfo* x = nullptr;
  QSPARSE_RETURN_IF_ERROR(api.ShapeInferContext_GetInputTypeShape(context, 0, &x));
  size_t rank = 0;
  QSPARSE_RETURN_IF_ERROR(api.GetDimensionsCount(x, &rank));
  std::vector<int64_t> dims(rank);
  std::vector<const char*> names(rank, "");
  QSPARSE_RETURN_IF_ERROR(api.GetDimensions(x, dims.data(), rank));
  QSPARSE_RETURN_IF_ERROR(api.GetSymbolicDimensions(x, names.data(), rank));
  if (change == Rank::kOneMore) {
    dims.push_back(last);
    names.push_back("");
    ++rank;
  } else if (rank > 0 && last >= 0) {
    dims[rank - 1] = last;
    names[rank - 1] = "";
  }
  if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED) {
    QSPARSE_RETURN_IF_ERROR(api.GetTensorElementType(x, &type));
  }
  OrtTensorTypeAndShapeInfo* y = nullptr;
  QSPARSE_RETURN_IF_ERROR(api.CreateTensorTypeAndShapeInfo(&y));
  OrtStatus* status = api.SetTensorElementType(y, type);
  if (status == nullptr) status = api.SetDimensions(y, dims.data(), rank);
  if (status == nullptr) status = api.SetSymbolicDimensions(y, names.data(), rank);
  if (status == nullptr) status = api.ShapeInferContext_SetOutputTypeShape(context, position, y);
  api.ReleaseTensorTypeAndShapeInfo(y);
  return status;
}

}  // namespace

OrtStatus* infer_like_x(const OrtApi& api, OrtShapeInferContext* context, int64_t last) {
  return infer(api, context, Rank::kSame, last, ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED);
}

OrtStatus* infer_same(const OrtApi& api, OrtShapeInferContext* context, size_t position) {
  return infer(api, context, Rank::kSame, -1, ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED, position);
}

OrtStatus* infer_half_as_wide(const OrtApi& api, OrtShapeInferContext* context) {
  OrtTensorTypeAndShapeInfo* x = nullptr;
  QSPARSE_RETURN_IF_ERROR(api.ShapeInferContext_GetInputTypeShape(context, 0, &x));
  size_t rank = 0;
  QSPARSE_RETURN_IF_ERROR(api.GetDimensionsCount(x, &rank));
  std::vector<int64_t> dims(rank);
  QSPARSE_RETURN_IF_ERROR(api.GetDimensions(x, dims.data(), rank));
  if (rank == 0 || dims[rank - 1] < 0) return nullptr;
  return infer(api, context, Rank::kSame, dims[rank - 1] / 2, kFloat);
}

OrtStatus* infer_rows(const OrtApi& api, OrtShapeInferContext* context, ONNXTensorElementDataType type) {
  const OrtOpAttr* attribute = nullptr;
  QSPARSE_RETURN_IF_ERROR(api.ShapeInferContext_GetAttribute(context, "k", &attribute));
  int64_t width = 0;
  size_t bytes = 0;
  QSPARSE_RETURN_IF_ERROR(api.ReadOpAttr(attribute, ORT_OP_ATTR_INT, &width, sizeof width, &bytes));
  return infer(api, context, Rank::kOneMore, width, type);
}

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

}  // namespace qsparse_ort
