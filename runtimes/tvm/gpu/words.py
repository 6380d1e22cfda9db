"""Weights as the GPU kernels take them: the bytes of the file, as words where rows are made of whole ones."""

from __future__ import annotations

import numpy as np
import onnx

from qsparse_export.runtimes.tvm.gpu.output_major import WORD_BYTES

_BITS = {
    onnx.TensorProto.INT4: 4,
    onnx.TensorProto.INT8: 8,
    onnx.TensorProto.UINT8: 8,
    onnx.TensorProto.FLOAT16: 16,
}
_WORD = (onnx.TensorProto.UINT32,)
_CHANNEL_MAJOR: dict[str, dict[int, tuple[onnx.TensorProto.DataType, ...]]] = {
    "SparseTernaryMatMul": {1: _WORD},
    "TernaryMatMul": {1: _WORD},
    "SparseMatMulNBits": {1: _WORD, 2: _WORD},
}
_OUTPUT_MAJOR: dict[int, tuple[onnx.TensorProto.DataType, ...]] = {1: _WORD, 2: (*_WORD, onnx.TensorProto.UINT16)}
_WEIGHTS = {**_CHANNEL_MAJOR, "DenseMatMulNBits": _OUTPUT_MAJOR, "GatherNBits": _OUTPUT_MAJOR}
"""Op to the places of its weights and scales among the inputs, and the types that they get: the first that a row is whole in."""
_TYPE_BITS = {onnx.TensorProto.UINT32: 8 * WORD_BYTES, onnx.TensorProto.UINT16: 16}


def as_words(rows: np.ndarray) -> np.ndarray:
    """uint8 or uint16 [..., K] as uint32 [..., words], or as it is where the last word would not be whole."""
    whole = rows.shape[-1] * rows.itemsize % WORD_BYTES == 0
    return np.ascontiguousarray(rows).view(np.uint32) if whole else rows


def in_words(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose packed weights and scales have the types that the kernels declare; their bytes stay what they are."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    wanted = {
        node.input[place]: dtypes
        for node in result.graph.node
        for place, dtypes in _WEIGHTS.get(node.op_type, {}).items()
    }
    for tensor in result.graph.initializer:
        if tensor.name in wanted and tensor.data_type in _BITS:
            row_bits = tensor.dims[-1] * _BITS[tensor.data_type]
            whole = [dtype for dtype in wanted[tensor.name] if row_bits % _TYPE_BITS[dtype] == 0]
            if whole:
                _retype(tensor, whole[0], row_bits // _TYPE_BITS[whole[0]])
    return result


def _retype(tensor: onnx.TensorProto, dtype: int, width: int) -> None:
    if tensor.data_location != onnx.TensorProto.EXTERNAL and not tensor.HasField("raw_data"):
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor), tensor.name))
    tensor.data_type = dtype
    tensor.dims[-1] = width
