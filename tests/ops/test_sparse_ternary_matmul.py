from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qsparse_export import ops
from qsparse_export.errors import UsageError
from qsparse_export.formats.ternary import pack
from qsparse_export.ops import ternary_matmul, topk_sparsify
from qsparse_export.ops.sparse_ternary_matmul import reference


def packed(outputs: list[int], k: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The joined weights of random matrices, and their scales."""
    rng = np.random.default_rng(seed)
    matrices = [pack(rng.integers(-1, 2, (n, k)).astype(np.int8)) for n in outputs]
    return np.concatenate(matrices, axis=1), np.linspace(0.01, 0.2, len(outputs)).astype(np.float32)


def test_reference_is_its_parts():
    x = np.random.default_rng(1).normal(size=(2, 3, 40)).astype(np.float32)
    w, scales = packed([130, 7], 40)
    masked = topk_sparsify.reference(x, 12)
    got = reference(x, w, scales, 12, 0, "none", [130, 7])
    np.testing.assert_array_equal(got[..., :130], ternary_matmul.reference(masked, w[:, :64], scales[:1], 130))
    np.testing.assert_array_equal(got[..., 130:], ternary_matmul.reference(masked, w[:, 64:], scales[1:], 7))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("level", ["off", "all"])
@pytest.mark.parametrize(
    ("shape", "n", "k", "block"),
    [
        ((10,), [3], 4, 0),
        ((2, 3, 96), [128, 5, 0, 256], 40, 0),
        ((2, 3, 90), [130, 130], 16, 32),
        ((4, 64), [1, 1, 1], 64, 0),
        ((4, 64), [129, 2], 0, 0),
        ((0, 64), [64, 3], 10, 0),
    ],
)
def test_body_is_bit_equal_to_the_reference(op_model, run_body, dtype, level, shape, n, k, block):
    x = (np.random.default_rng(2).normal(size=shape) * 50).astype(dtype)
    rows = x.reshape(-1, shape[-1])
    if len(rows) > 1:
        rows[1, 2] = np.nan
        rows[2, [0, 5]] = -np.inf, 3
        rows[3] = 0
    w, scales = packed(n, shape[-1])
    expected = reference(x, w, scales, k, block, "none", n)
    model = op_model("SparseTernaryMatMul", x, {"w": w, "scales": scales}, k=k, block=block, rescale="none", n=n)
    got = run_body(model, x, level)
    assert got.dtype == dtype and got.shape == (*shape[:-1], sum(n))
    np.testing.assert_array_equal(got, expected)


def test_body_rescales(op_model, run_body):
    """float32 sums of squares in another order: an integer of the quantiser may move by one, the product hardly."""
    x = np.random.default_rng(3).normal(size=(3, 96)).astype(np.float32)
    w, scales = packed([40, 3], 96)
    model = op_model("SparseTernaryMatMul", x, {"w": w, "scales": scales}, k=40, block=0, rescale="l2", n=[40, 3])
    expected = reference(x, w, scales, 40, 0, "l2", [40, 3])
    np.testing.assert_allclose(run_body(model, x), expected, atol=2 * 0.2 / 127, rtol=1e-5)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 140), min_size=1, max_size=4), st.integers(0, 24), st.integers(0, 1000))
def test_property_body_is_bit_equal_to_the_reference(op_model, run_body, n, k, seed):
    x = np.random.default_rng(seed).normal(size=(2, 24)).astype(np.float32)
    w, scales = packed(n, 24, seed)
    model = op_model("SparseTernaryMatMul", x, {"w": w, "scales": scales}, k=k, block=0, rescale="none", n=n)
    np.testing.assert_array_equal(run_body(model, x), reference(x, w, scales, k, 0, "none", n))


def test_schema_infers_the_shape_through_the_graph(op_model):
    x = np.zeros((2, 3, 12), np.float32)
    w, scales = packed([5, 130], 12)
    model = op_model("SparseTernaryMatMul", x, {"w": w, "scales": scales}, k=3, block=0, rescale="none", n=[5, 130])
    del model.functions[:]
    model.graph.output[0].type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph.output[0].type.tensor_type
    assert [d.dim_param or d.dim_value for d in inferred.shape.dim] == ["d0", "d1", 135]


def test_the_body_brings_the_one_that_it_calls(op_model):
    w, scales = packed([5], 12)
    x = np.zeros((1, 12), np.float32)
    model = op_model("SparseTernaryMatMul", x, {"w": w, "scales": scales}, k=3, block=0, rescale="none", n=[5])
    assert sorted(function.name for function in model.functions) == ["SparseTernaryMatMul", "TopKSparsify"]


def test_constant_weights_fold_and_the_product_stays_an_integer_matmul(op_model, tmp_path):
    import onnxruntime as ort

    x = np.ones((1, 64), np.float32)
    w, scales = packed([16, 140], 64)
    model = op_model("SparseTernaryMatMul", x, {"w": w, "scales": scales}, k=20, block=0, rescale="none", n=[16, 140])
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "folded.onnx")
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "folded.onnx").graph.node]
    assert "MatMulInteger" in kinds and "Gather" not in kinds and "CumSum" not in kinds


def test_wrong_operands_are_refused():
    x = np.ones((2, 12), np.float32)
    w, scales = packed([5, 130], 12)
    for arguments in ((w[:, 32:], scales, 3, 0, "none", [5, 130]), (w, scales[:1], 3, 0, "none", [5, 130])):
        with pytest.raises(UsageError, match=r"expected \[12, 96\] and \[2\] for 12 inputs and outputs \[5, 130\]"):
            reference(x, *arguments)
    with pytest.raises(UsageError, match="k is 13"):
        reference(x, w, scales, 13, 0, "none", [5, 130])


def test_no_torch_op_and_no_translation():
    entry = ops.op("SparseTernaryMatMul")
    assert entry.torch_op is None and entry.translate is None
    assert len(ops.translation_table()) == sum(ops.op(name).torch_op is not None for name in ops.OPS)
