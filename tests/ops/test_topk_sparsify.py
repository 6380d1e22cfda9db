from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qsparse_export import ops
from qsparse_export.errors import UsageError
from qsparse_export.ops.topk_sparsify import reference, topk_sparsify

LEVELS = ["off", "basic", "extended", "all"]
DTYPES = [np.float32, np.float16]
ROUNDING = {np.dtype(np.float32): 1e-6, np.dtype(np.float16): 1e-3}


def assert_same(got: np.ndarray, expected: np.ndarray, rescale: str) -> None:
    assert got.dtype == expected.dtype and got.shape == expected.shape
    if rescale == "none":
        np.testing.assert_array_equal(got, expected)
    else:
        np.testing.assert_allclose(got, expected, rtol=ROUNDING[expected.dtype], atol=1e-7)


def awkward(shape: tuple[int, ...], dtype: type, seed: int = 0) -> np.ndarray:
    """Small integers, so that ties abound, with NaN and Inf in the first row."""
    x: np.ndarray = np.round(np.random.default_rng(seed).normal(size=shape) * 2).astype(dtype)
    if x.size >= 10:
        x.reshape(-1)[[2, 5, 8]] = np.nan, -np.inf, np.nan
    return x


def test_reference_by_hand():
    x = np.array([[3, -1, 3, 2, -3, 0]], np.float32)
    np.testing.assert_array_equal(reference(x, 2), [[3, 0, 3, 0, 0, 0]])  # lowest index wins among three 3s
    np.testing.assert_array_equal(reference(x, 0), np.zeros_like(x))
    np.testing.assert_array_equal(reference(x, 6), x)
    np.testing.assert_array_equal(reference(x, 1, block=2), [[3, 0, 3, 0, -3, 0]])
    np.testing.assert_array_equal(reference(x, 2, block=4), [[3, 0, 3, 0, -3, 0]])  # last block is shorter
    np.testing.assert_allclose(reference(x, 2, rescale="l2"), [[0.5**0.5, 0, 0.5**0.5, 0, 0, 0]], rtol=1e-6)


def test_nan_ranks_first_and_is_never_dropped():
    nan, inf = np.nan, np.inf
    x = np.array([[1, nan, inf, nan, 5]], np.float32)
    np.testing.assert_array_equal(reference(x, 1), [[0, nan, 0, nan, 0]])
    np.testing.assert_array_equal(reference(x, 2), [[0, nan, inf, nan, 0]])
    np.testing.assert_array_equal(reference(x, 4), [[0, nan, inf, nan, 5]])
    np.testing.assert_array_equal(reference(x, 0), [[0, nan, 0, nan, 0]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(10,), (3, 10), (2, 3, 2730), (0, 64), (2, 0, 64)])
@pytest.mark.parametrize("block", [0, 4, 32, 4096])
@pytest.mark.parametrize("rescale", ["none", "l2"])
def test_body_and_torch_equal_the_reference(op_model, run_body, dtype, shape, block, rescale):
    x = awkward(shape, dtype)
    width = block or shape[-1]
    for k, level in zip(sorted({0, 1, width // 2, width}), ["basic", "extended", "all", "off"], strict=False):
        expected = reference(x, k, block, rescale)
        model = op_model("TopKSparsify", x, {}, k=k, block=block, rescale=rescale)
        assert_same(run_body(model, x, level), expected, rescale)
        assert_same(topk_sparsify(torch.from_numpy(x), k, block, rescale).numpy(), expected, rescale)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("block", [0, 3])
def test_body_at_every_optimisation_level(op_model, run_body, level, block):
    for rescale in ("none", "l2"):
        x = awkward((4, 11), np.float32)
        model = op_model("TopKSparsify", x, {}, k=2, block=block, rescale=rescale)
        assert_same(run_body(model, x, level), reference(x, 2, block, rescale), rescale)


VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 1e-7, 65504.0, np.inf, -np.inf, np.nan])


@settings(max_examples=60, deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=40), st.integers(0, 40), st.integers(0, 12))
def test_property_torch_equals_reference_and_keeps_exactly_k(values, k, block):
    x = np.array(values, np.float32)
    k = min(k, block or len(x))
    y = topk_sparsify(torch.from_numpy(x), k, block, "none").numpy()
    np.testing.assert_array_equal(y, reference(x, k, block))
    assert np.isnan(y[np.isnan(x)]).all()
    width = block or len(x)
    for start in range(0, len(x), width):
        piece = np.abs(x[start : start + width])
        if not (np.isnan(piece).any() or (piece == 0).any()):
            assert np.count_nonzero(y[start : start + width]) == min(k, len(piece))
    if not np.isnan(x).any():
        np.testing.assert_array_equal(topk_sparsify(torch.from_numpy(y), k, block, "none").numpy(), y)  # idempotent


@settings(max_examples=25, deadline=None)
@given(st.lists(VALUES, min_size=12, max_size=12), st.sampled_from([0, 1, 4]), st.sampled_from([0, 5]))
def test_property_body_equals_reference(op_model, run_body, values, k, block):
    x = np.array([values], np.float32)
    model = op_model("TopKSparsify", x, {}, k=k, block=block, rescale="none")
    np.testing.assert_array_equal(run_body(model, x), reference(x, k, block))


def test_infinite_unselected_channel_becomes_zero_not_nan(op_model, run_body):
    x = np.array([[np.inf, -np.inf, 1]], np.float32)
    model = op_model("TopKSparsify", x, {}, k=1, block=0, rescale="none")
    np.testing.assert_array_equal(run_body(model, x), [[np.inf, 0, 0]])


def test_float16_norm_is_taken_in_float32(op_model, run_body):
    x = np.full((1, 256), 1000, np.float16)  # squares and their sum overflow float16
    model = op_model("TopKSparsify", x, {}, k=256, block=0, rescale="l2")
    for y in (run_body(model, x), topk_sparsify(torch.from_numpy(x), 256, 0, "l2").numpy()):
        np.testing.assert_array_equal(y, np.full((1, 256), 1 / 16, np.float16))


def test_zero_row_rescales_to_zero():
    assert topk_sparsify(torch.zeros(2, 8), 3, 0, "l2").eq(0).all()


@pytest.mark.parametrize("attributes", [(-1, 0, "none"), (9, 0, "none"), (5, 4, "none"), (1, -1, "none"), (1, 0, "l1")])
def test_bad_attributes_are_refused(attributes):
    with pytest.raises(UsageError, match="expected"):
        topk_sparsify(torch.ones(2, 8), *attributes)
    with pytest.raises(UsageError, match="expected"):
        reference(np.ones((2, 8), np.float32), *attributes)


@pytest.mark.parametrize("rescale", ["none", "l2"])
@pytest.mark.parametrize("block", [0, 3])
def test_opcheck(rescale, block):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = torch.randn(2, 8, dtype=dtype, requires_grad=True)
        torch.library.opcheck(torch.ops.qsparse.topk_sparsify.default, (x, 2, block, rescale))


def test_backward_treats_the_mask_as_identity():
    x = torch.randn(4, 16, requires_grad=True)
    incoming = torch.randn(4, 16)
    topk_sparsify(x, 5, 0, "none").backward(incoming)
    torch.testing.assert_close(x.grad, incoming, rtol=0, atol=0)


@pytest.mark.parametrize("k", [0, 5, 16])
def test_backward_of_rescale_is_that_of_the_masked_row(k):
    """dL/dx = dL/d(x * M): autograd through the rescale only, with x * M as the leaf."""
    x = torch.randn(4, 16, dtype=torch.float64, requires_grad=True)
    incoming = torch.randn(4, 16, dtype=torch.float64)
    topk_sparsify(x, k, 0, "l2").backward(incoming)
    leaf = topk_sparsify(x.detach(), k, 0, "none").requires_grad_()
    (leaf / leaf.norm(dim=-1, keepdim=True).clamp_min(1e-12)).backward(incoming)
    torch.testing.assert_close(x.grad, leaf.grad)


def test_gradcheck_where_the_mask_is_the_identity():
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    for rescale in ("none", "l2"):
        assert torch.autograd.gradcheck(lambda t, r=rescale: topk_sparsify(t, 7, 0, r), (x,))


def test_schema_infers_the_shape_through_the_graph(op_model):
    x = np.zeros((2, 3, 12), np.float16)
    model = op_model("TopKSparsify", x, {}, k=2, block=0, rescale="none")
    del model.functions[:]
    model.graph.output[0].type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph.output[0].type.tensor_type
    assert inferred.elem_type == onnx.TensorProto.FLOAT16
    assert [d.dim_param or d.dim_value for d in inferred.shape.dim] == ["d0", "d1", 12]


def test_registration_is_idempotent_and_unknown_ops_are_named():
    ops.register()
    ops.register()
    assert onnx.defs.has("TopKSparsify", 1, "ai.qsparse")
    with pytest.raises(UsageError, match="did you mean TopKSparsify"):
        ops.op("TopkSparsify")
