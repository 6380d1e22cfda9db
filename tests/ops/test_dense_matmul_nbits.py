from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qsparse_export.errors import UsageError
from qsparse_export.formats import nbits
from qsparse_export.ops.dense_matmul_nbits import SLICE_ROWS, dense_matmul_nbits, reference

EPS = 2.0**-24
LARGEST_SCALE = 0.2
GROUP = st.sampled_from([8, 16, 24, 71, 128])  # a multiple of 8, or all inputs


def matrix(n: int, k: int, bits: int, group: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Packed codes, scales and the same matrix as float64 [N, K]."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-(1 << bits - 1), 1 << bits - 1, (n, k)).astype(np.int8)
    scales = rng.uniform(0.01, LARGEST_SCALE, (n, nbits.group_count(k, group))).astype(np.float16)
    return nbits.pack_outputs(codes, bits), scales, codes * scales[:, np.arange(k) // group].astype(np.float64)


def allowed(x: np.ndarray, dense: np.ndarray, bits: int, expected: np.ndarray) -> np.ndarray:
    """K + 4 roundings of sums of |x| (|w| + zero point), and that of the result."""
    last = 2.0**-11 * np.abs(expected.astype(np.float64)) if x.dtype == np.float16 else 0.0
    largest = np.abs(dense) + (1 << bits - 1) * LARGEST_SCALE
    return (x.shape[-1] + 4) * EPS * (np.abs(x.astype(np.float64)) @ largest.T) + last + 2.0**-24


def test_reference_is_the_dequantised_product():
    x = np.random.default_rng(1).normal(size=(2, 3, 75)).astype(np.float32)
    w, scales, dense = matrix(9, 75, 4, 32)
    np.testing.assert_array_equal(
        reference(x, w, scales, 9, 75, 4, 32), (x.astype(np.float64) @ dense.T).astype(np.float32)
    )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("level", ["off", "all"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(
    ("shape", "n", "group"),
    [((32,), 3, 32), ((2, 3, 96), 130, 32), ((4, 75), 17, 24), ((4, 75), 1, 64), ((4, 90), 33, 128), ((0, 64), 7, 16)],
)
def test_body_is_the_reference(op_model, run_body, bits, level, dtype, shape, n, group):
    k = shape[-1]
    x = (np.random.default_rng(2).normal(size=shape) * 3).astype(dtype)
    rows = x.reshape(-1, k)
    if len(rows) > 1:
        rows[1, 2] = np.nan
        rows[2, [0, 5]] = -np.inf, 3
        rows[3] = 0
    w, scales, dense = matrix(n, k, bits, group)
    attributes = {"n": n, "k": k, "bits": bits, "group": group}
    expected = reference(x, w, scales, **attributes)
    got = run_body(op_model("DenseMatMulNBits", x, {"w": w, "scales": scales}, **attributes), x, level)
    assert got.dtype == dtype and got.shape == (*shape[:-1], n)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    error = np.abs(got.astype(np.float64) - expected)
    bound = allowed(np.where(np.isfinite(x), x, 0), dense, bits, np.where(finite, expected, 0))
    assert (error <= bound)[finite].all(), (error / bound)[finite].max()


@pytest.mark.parametrize(("bits", "products"), [(4, 1), (8, 2)])
def test_body_stays_packed_in_onnx_runtime(op_model, tmp_path, bits, products):
    """What a session keeps is 4-bit weights, and no node is left that unpacks them."""
    x = np.random.default_rng(0).normal(size=(2, 96)).astype(np.float32)
    w, scales, _ = matrix(70, 96, bits, 32)
    model = op_model("DenseMatMulNBits", x, {"w": w, "scales": scales}, n=70, k=96, bits=bits, group=32)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
    kernels = [{a.name: a.i for a in node.attribute}["bits"] for node in nodes if node.op_type == "MatMulNBits"]
    assert kernels == [4] * products
    assert not {"DequantizeLinear", "BitShift", "BitwiseAnd", "Transpose", "MatMul", "Gemm"} & {
        n.op_type for n in nodes
    }


@pytest.mark.parametrize("n", [9, SLICE_ROWS + 1])
def test_torch_op_is_the_reference(n):
    x = torch.randn(2, 5, 70)
    w, scales, dense = matrix(n, 70, 4, 32)
    got = dense_matmul_nbits(x, torch.from_numpy(w), torch.from_numpy(scales), n, 4, 32).numpy()
    expected = reference(x.numpy(), w, scales, n, 70, 4, 32)
    assert (np.abs(got - expected) <= allowed(x.numpy(), dense, 4, expected)).all()


def test_torch_op_gives_nan_for_a_row_that_is_not_finite():
    x = torch.randn(3, 40)
    x[1, 7] = torch.inf
    w, scales, _ = matrix(9, 40, 8, 32)
    got = dense_matmul_nbits(x, torch.from_numpy(w), torch.from_numpy(scales), 9, 8, 32)
    assert got.isnan().all(-1).tolist() == [False, True, False] and got[[0, 2]].isfinite().all()


@pytest.mark.parametrize("bits", [4, 8])
def test_torch_op_passes_opcheck(bits):
    x = torch.randn(2, 40, requires_grad=True)
    w, scales, _ = matrix(9, 40, bits, 32)
    torch.library.opcheck(dense_matmul_nbits, (x, torch.from_numpy(w), torch.from_numpy(scales), 9, bits, 32))


def test_gradient_is_that_of_the_dequantised_product():
    n = SLICE_ROWS + 3
    x = torch.randn(3, 40, requires_grad=True)
    w, scales, dense = matrix(n, 40, 8, 16)
    grad = torch.randn(3, n)
    dense_matmul_nbits(x, torch.from_numpy(w), torch.from_numpy(scales), n, 8, 16).backward(grad)
    np.testing.assert_allclose(x.grad.numpy(), grad.numpy() @ dense, rtol=1e-3, atol=1e-2)


def test_operands_that_do_not_fit_are_refused():
    w, scales, _ = matrix(9, 40, 4, 32)
    with pytest.raises(UsageError, match="expected 41 inputs"):
        reference(np.zeros((1, 40), np.float32), w, scales, 9, 41, 4, 32)
    with pytest.raises(UsageError, match=r"expected \[9, 20\] and \[9, 3\]"):
        dense_matmul_nbits(torch.zeros(1, 40), torch.from_numpy(w), torch.from_numpy(scales), 9, 4, 16)
    with pytest.raises(UsageError, match="4 or 8 bits"):
        dense_matmul_nbits(torch.zeros(1, 40), torch.from_numpy(w), torch.from_numpy(scales), 9, 5, 32)
    with pytest.raises(UsageError, match="expected a multiple of 8"):
        dense_matmul_nbits(torch.zeros(1, 40), torch.from_numpy(w), torch.from_numpy(scales), 9, 4, 20)
    with pytest.raises(UsageError, match="expected uint8 and float16"):
        dense_matmul_nbits(torch.zeros(1, 40), torch.from_numpy(w), torch.from_numpy(scales).float(), 9, 4, 32)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([4, 8]), GROUP, st.integers(0, 99))
def test_property_body_is_the_reference(op_model, run_body, n, k, bits, group, seed):
    x = np.random.default_rng(seed).normal(size=(2, k)).astype(np.float32)
    w, scales, dense = matrix(n, k, bits, group, seed)
    attributes = {"n": n, "k": k, "bits": bits, "group": group}
    model = op_model("DenseMatMulNBits", x, {"w": w, "scales": scales}, **attributes)
    expected = reference(x, w, scales, **attributes)
    error = np.abs(run_body(model, x).astype(np.float64) - expected)
    assert (error <= allowed(x, dense, bits, expected)).all()
