from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qsparse_export.errors import UsageError
from qsparse_export.formats.ternary import pack
from qsparse_export.ops.ternary_matmul import reference, ternary_matmul, unpacked

LEVELS = ["off", "basic", "extended", "all"]
SCALE = np.array([0.0173], np.float32)


def weights(n: int, k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1, 2, size=(n, k)).astype(np.int8)


def on_torch(x: np.ndarray, w: np.ndarray, n: int, scale: np.ndarray = SCALE) -> np.ndarray:
    return ternary_matmul(torch.from_numpy(x), torch.from_numpy(w), torch.from_numpy(scale), n).numpy()


def test_reference_by_hand():
    x = np.array([[127.0, -2.5, 1.5, 0.5]], np.float32)  # gamma 127: q = 127, -2, 2, 0 (half to even)
    w = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [-1, 1, 1, 1]], np.int8)
    y = reference(x, pack(w), np.array([2.0], np.float32), 5)
    np.testing.assert_array_equal(y, np.array([[254, -4, 4, 0, -254]], np.float32))


def test_reference_equals_the_float_formula_closely():
    rng = np.random.default_rng(1)
    x, w = rng.normal(size=(4, 96)).astype(np.float32), weights(7, 96)
    gamma = np.abs(x).max(-1, keepdims=True)
    expected = (np.round(x * 127 / gamma) * gamma / 127) @ w.T.astype(np.float64) * float(SCALE[0])
    np.testing.assert_allclose(reference(x, pack(w), SCALE, 7), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("shape", "n"), [((10,), 3), ((2, 3, 2730), 130), ((0, 64), 64), ((2, 0, 64), 5), ((4, 64), 1)]
)
def test_body_and_torch_are_bit_equal_to_the_reference(op_model, run_body, dtype, level, shape, n):
    x = (np.random.default_rng(2).normal(size=shape) * 50).astype(dtype)
    rows = x.reshape(-1, shape[-1])
    if len(rows) > 1:
        rows[0] = 1e-8  # below the floor of gamma
        rows[1, 2] = np.nan
        rows[2, [0, 5]] = -np.inf, 3
        rows[3] = 0
    w = pack(weights(n, shape[-1]))
    expected = reference(x, w, SCALE, n)
    model = op_model("TernaryMatMul", x, {"w": w, "scale": SCALE}, n=n)
    for got in (run_body(model, x, level), on_torch(x, w, n)):
        assert got.dtype == dtype and got.shape == (*shape[:-1], n)
        np.testing.assert_array_equal(got, expected)
    if len(rows) > 1:
        assert np.isnan(expected.reshape(-1, n)[[1, 2]]).all() and not np.isnan(expected.reshape(-1, n)[[0, 3]]).any()


def test_body_is_bit_equal_for_many_rows_and_matches_at_extremes(op_model, run_body):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(64, 2560)).astype(np.float32) * np.exp(rng.normal(size=(64, 1)) * 5).astype(np.float32)
    x[0], x[1, ::2] = 3.0, -3.0  # q = 127 and -127 everywhere
    w = np.where(np.arange(2560)[None, :] < 1300, 1, weights(48, 2560)).astype(np.int8)
    packed = pack(w)
    expected = reference(x, packed, SCALE, 48)
    model = op_model("TernaryMatMul", x, {"w": packed, "scale": SCALE}, n=48)
    np.testing.assert_array_equal(run_body(model, x), expected)
    np.testing.assert_array_equal(on_torch(x, packed, 48), expected)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1, max_size=24),
    st.integers(1, 9),
    st.floats(2**-16, 1e4, width=32),
)
def test_property_torch_is_bit_equal_to_the_reference(values, n, scale):
    x, w = np.array([values], np.float32), pack(weights(n, len(values), seed=n))
    alpha = np.array([scale], np.float32)
    np.testing.assert_array_equal(on_torch(x, w, n, alpha), reference(x, w, alpha, n))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(width=32), min_size=8, max_size=8), st.integers(1, 5))
def test_property_body_is_bit_equal_to_the_reference(op_model, run_body, values, n):
    x, w = np.array([values], np.float32), pack(weights(n, 8, seed=n))
    model = op_model("TernaryMatMul", x, {"w": w, "scale": SCALE}, n=n)
    np.testing.assert_array_equal(run_body(model, x), reference(x, w, SCALE, n))


def test_float64_sum_beyond_the_exact_range_of_float32():
    k = (1 << 24) // 128 + 5
    x = np.full((1, k), 1.0, np.float32)
    x[0, 1] = 126.5 / 127
    w = pack(np.ones((1, k), np.int8))
    np.testing.assert_array_equal(on_torch(x, w, 1), reference(x, w, SCALE, 1))


def test_unpacked_inverts_pack():
    w = weights(131, 9)
    np.testing.assert_array_equal(unpacked(torch.from_numpy(pack(w)), 131).numpy(), w.T)


def test_opcheck():
    w, scale = torch.from_numpy(pack(weights(5, 8))), torch.from_numpy(SCALE)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = torch.randn(3, 8, dtype=dtype, requires_grad=True)
        torch.library.opcheck(torch.ops.qsparse.ternary_matmul.default, (x, w, scale, 5))


def test_backward_is_straight_through_the_quantiser():
    w = weights(5, 8)
    x = torch.randn(3, 8, requires_grad=True)
    incoming = torch.randn(3, 5)
    ternary_matmul(x, torch.from_numpy(pack(w)), torch.from_numpy(SCALE), 5).backward(incoming)
    torch.testing.assert_close(x.grad, incoming @ (torch.from_numpy(w).float() * float(SCALE[0])))


def test_wrong_operands_are_refused():
    x, w, scale = torch.ones(2, 8), torch.from_numpy(pack(weights(5, 8))), torch.from_numpy(SCALE)
    with pytest.raises(UsageError, match=r"expected uint8 \[9, 32\] for 9 inputs and 5 outputs"):
        ternary_matmul(torch.ones(2, 9), w, scale, 5)
    with pytest.raises(UsageError, match=r"expected uint8 \[8, 64\]"):
        ternary_matmul(x, w, scale, 129)
    with pytest.raises(UsageError, match=r"expected float32 \[1\]"):
        ternary_matmul(x, w, scale.half(), 5)
    with pytest.raises(UsageError, match="expected floating point"):
        ternary_matmul(x.int(), w, scale, 5)


def test_constant_weights_fold_and_the_product_stays_an_integer_matmul(op_model, tmp_path):
    import onnxruntime as ort

    x, w = np.ones((1, 64), np.float32), pack(weights(16, 64))
    model = op_model("TernaryMatMul", x, {"w": w, "scale": SCALE}, n=16)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "folded.onnx")
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "folded.onnx").graph.node]
    assert "MatMulInteger" in kinds and "Gather" not in kinds and "Slice" not in kinds


def test_schema_infers_the_shape_through_the_graph(op_model):
    x = np.zeros((2, 3, 12), np.float32)
    model = op_model("TernaryMatMul", x, {"w": pack(weights(5, 12)), "scale": SCALE}, n=5)
    del model.functions[:]
    model.graph.output[0].type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph.output[0].type.tensor_type
    assert [d.dim_param or d.dim_value for d in inferred.shape.dim] == ["d0", "d1", 5]
