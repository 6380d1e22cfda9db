"""How much larger than the file opening it is, where ternary products run as function bodies."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from qsparse_export.runtimes.ort.unpacking import unpacked_bytes

PACKED = np.zeros((8, 32), np.uint8)  # 8 inputs, 128 outputs


def graph(op: str) -> ir.Model:
    w = onnx.numpy_helper.from_array(PACKED, "w")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "scale", "y")]
    node = helper.make_node(op, ["x", "w", "scale"], ["y"], domain="ai.qsparse")
    made = helper.make_graph([node], "one", values[:2], values[2:], [w])
    return ir.from_proto(helper.make_model(made, opset_imports=[helper.make_opsetid("ai.qsparse", 1)]))


@pytest.mark.parametrize("op", ["TernaryMatMul", "SparseTernaryMatMul"])
def test_an_index_and_three_times_the_weights(op):
    weights = 8 * 128
    assert unpacked_bytes(graph(op)) == weights // 4 * 4 + 3 * weights


def test_other_products_stay_packed():
    assert unpacked_bytes(graph("SparseMatMulNBits")) == 0
