#include "kernel.h"

#include <vector>

namespace qsparse_ort {

OrtStatus* infer_like(const OrtApi& api, OrtShapeInferContext* context, const Likeness& likeness) {
  OrtTensorTypeAndShapeInfo* x = nullptr;
  QSPARSE_RETURN_IF_ERROR(api.ShapeInferContext_GetInputTypeShape(context, likeness.input, &x));
  size_t rank = 0;
  QSPARSE_RETURN_IF_ERROR(api.GetDimensionsCount(x, &rank));
  std::vector<int64_t> dims(rank);
  std::vector<const char*> names(rank, "");
  QSPARSE_RETURN_IF_ERROR(api.GetDimensions(x, dims.data(), rank));
  QSPARSE_RETURN_IF_ERROR(api.GetSymbolicDimensions(x, names.data(), rank));
  if (rank > 0 && likeness.last >= 0) {
    dims[rank - 1] = likeness.last;
    names[rank - 1] = "";
  }
  ONNXTensorElementDataType type = likeness.type;
  if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED) QSPARSE_RETURN_IF_ERROR(api.GetTensorElementType(x, &type));
  OrtTensorTypeAndShapeInfo* y = nullptr;
  QSPARSE_RETURN_IF_ERROR(api.CreateTensorTypeAndShapeInfo(&y));
  OrtStatus* status = api.SetTensorElementType(y, type);
  if (status == nullptr) status = api.SetDimensions(y, dims.data(), rank);
  if (status == nullptr) status = api.SetSymbolicDimensions(y, names.data(), rank);
  if (status == nullptr) status = api.ShapeInferContext_SetOutputTypeShape(context, likeness.output, y);
  api.ReleaseTensorTypeAndShapeInfo(y);
  return status;
}

OrtStatus* last_dimension(const OrtApi& api, OrtShapeInferContext* context, size_t input, int64_t* last) {
  OrtTensorTypeAndShapeInfo* x = nullptr;
  QSPARSE_RETURN_IF_ERROR(api.ShapeInferContext_GetInputTypeShape(context, input, &x));
  size_t rank = 0;
  QSPARSE_RETURN_IF_ERROR(api.GetDimensionsCount(x, &rank));
  std::vector<int64_t> dims(rank);
  QSPARSE_RETURN_IF_ERROR(api.GetDimensions(x, dims.data(), rank));
  *last = rank > 0 ? dims[rank - 1] : -1;
  return nullptr;
}

}  // namespace qsparse_ort
