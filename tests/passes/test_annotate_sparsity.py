"""annotate-sparsity: k, density and bytes of every mask and product, no weight read, the same when run again."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qsparse_export import ops
from qsparse_export.passes.annotate_sparsity import BYTES, DENSITY, AnnotateSparsity, K

TEXT = """
  <ir_version: 11, opset_import: ["" : 23, "ai.qsparse" : 1]>
  g (float[M, 96] x) => (float[M, 6] y, float[M, 130] q, float[M, M] scores, float[M, 96] b)
  <uint8[96, 64] packed, float[1] scale, float[96, 6] w> {
    h = ai.qsparse.TopKSparsify <k = 24, block = 0, rescale = "none"> (x)
    b = ai.qsparse.TopKSparsify <k = 8, block = 32, rescale = "none"> (x)
    y = MatMul (h, w)
    q = ai.qsparse.SparseTernaryMatMul <k = 48, block = 0, rescale = "none", n = [130]> (x, packed, scale)
    turned = Transpose <perm = [1, 0]> (x)
    scores = MatMul (x, turned)
  }
"""


CONSTANTS = {
    "packed": np.zeros((96, 64), np.uint8),
    "scale": np.ones(1, np.float32),
    "w": np.ones((96, 6), np.float32),
}


@pytest.fixture
def model():
    ops.register()
    proto = onnx.parser.parse_model(TEXT)
    del proto.graph.value_info[:]
    for name, array in CONSTANTS.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    made = ir.from_proto(onnx.shape_inference.infer_shapes(proto))

    def read():
        raise AssertionError("a weight was read")

    for name, value in made.graph.initializers.items():
        stored = value.const_value
        shape = ir.Shape(stored.shape.numpy())
        value.const_value = ir.LazyTensor(read, dtype=stored.dtype, shape=shape, name=name)
    return made


def notes(model):
    keys = {K: "k", DENSITY: "density", BYTES: "bytes"}
    return {
        node.outputs[0].name: {
            short: float(node.metadata_props[key]) for key, short in keys.items() if key in node.metadata_props
        }
        for node in model.graph
    }


def test_masks_and_products_are_noted(model):
    assert AnnotateSparsity()(model).modified
    assert notes(model) == {
        "h": {"k": 24, "density": 0.25, "bytes": 0},
        "b": {"k": 8, "density": 0.25, "bytes": 0},
        "y": {"k": 24, "density": 0.25, "bytes": 96 * 6 * 4},
        "q": {"k": 48, "density": 0.5, "bytes": 96 * 64 + 4},
        "turned": {},
        "scores": {},
    }


def test_twice_changes_nothing_and_other_notes_stay(model):
    model.graph.node(0).metadata_props["ai.qsparse.scope"] = "layer"
    AnnotateSparsity()(model)
    assert model.graph.node(0).metadata_props["ai.qsparse.scope"] == "layer"
    assert not AnnotateSparsity()(model).modified


def test_a_dense_product_has_density_one(model):
    model.graph.node(2).replace_input_with(0, model.graph.inputs[0])
    AnnotateSparsity()(model)
    assert notes(model)["y"] == {"k": 96, "density": 1, "bytes": 96 * 6 * 4}


def test_old_notes_go():
    made = ir.from_proto(
        onnx.parser.parse_model(
            '<ir_version: 10, opset_import: ["" : 23]> g (float[N] x) => (float[N] y) { y = Neg (x) }'
        )
    )
    made.graph.node(0).metadata_props[BYTES] = "12"
    assert AnnotateSparsity()(made).modified
    assert not made.graph.node(0).metadata_props
