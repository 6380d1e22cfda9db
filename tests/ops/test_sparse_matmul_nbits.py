from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qsparse_export.errors import UsageError
from qsparse_export.formats import nbits
from qsparse_export.ops import topk_sparsify
from qsparse_export.ops.sparse_matmul_nbits import matmul_nbits, reference

EPS = 2.0**-24
OUTPUTS = st.lists(st.integers(0, 140), min_size=1, max_size=4).filter(sum)  # ONNX Runtime refuses to pack no columns


def matrices(outputs: list[int], k: int, bits: int, group: int, seed: int = 0):
    """Joined codes (uint8, packed) and scales of random matrices, and each matrix as float64 [N, K]."""
    rng = np.random.default_rng(seed)
    packed, scales, dense = [], [], []
    for n in outputs:
        codes = rng.integers(-(1 << bits - 1), 1 << bits - 1, (n, k)).astype(np.int8)
        scale = np.zeros((nbits.group_count(k, group), nbits.columns(n)), np.float16)
        scale[:, :n] = rng.uniform(0.01, 0.2, (len(scale), n))
        packed.append(nbits.pack_channels(codes, bits))
        scales.append(scale)
        dense.append(codes * scale[np.arange(k) // group, :n].T.astype(np.float64))
    return np.concatenate(packed, axis=1), np.concatenate(scales, axis=1), dense


def onnx_weights(packed: np.ndarray, bits: int) -> np.ndarray:
    """The typed tensor of the file: int8, or int4 elements."""
    if bits == 8:
        return packed.view(np.int8)
    nibbles = np.stack((packed & 15, packed >> 4), axis=-1).reshape(len(packed), -1)
    return ((nibbles ^ 8).astype(np.int8) - 8).astype(ml_dtypes.int4)


def bound(x: np.ndarray, dense: list[np.ndarray], bits: int, group: int) -> np.ndarray:
    """What K + 4 roundings may move: weights are differences of codes and a zero point, so each counts for |w| + zero."""
    k = x.shape[-1]
    largest = np.concatenate([np.abs(w) for w in dense]) + (1 << bits - 1) * 0.2
    return (k + 4) * EPS * (np.abs(x.astype(np.float64)) @ largest.T)


def tolerance(x, dense, bits, group, expected) -> np.ndarray:
    half = 2.0**-11 * np.abs(expected.astype(np.float64)) + 2.0**-24 if x.dtype == np.float16 else 2.0**-24
    return bound(x, dense, bits, group) + half


def test_reference_is_a_masked_product():
    x = np.random.default_rng(1).normal(size=(2, 3, 70)).astype(np.float32)
    packed, scales, dense = matrices([65, 7], 70, 4, 32)
    masked = topk_sparsify.reference(x, 30).astype(np.float64)
    got = reference(x, packed, scales, 30, 0, "none", [65, 7], 4, 32)
    np.testing.assert_array_equal(got, (masked @ np.concatenate(dense).T).astype(np.float32))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("level", ["off", "all"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(
    ("shape", "n", "k", "block", "group"),
    [
        ((32,), [3], 4, 0, 32),
        ((2, 3, 96), [128, 5, 0, 64], 40, 0, 32),
        ((2, 3, 90), [130, 130], 16, 32, 64),
        ((4, 64), [1, 1, 1], 64, 0, 16),
        ((4, 64), [129, 2], 0, 0, 128),
        ((0, 64), [64, 3], 10, 0, 64),
    ],
)
def test_body_is_the_reference(op_model, run_body, bits, level, dtype, shape, n, k, block, group):
    x = (np.random.default_rng(2).normal(size=shape) * 3).astype(dtype)
    rows = x.reshape(-1, shape[-1])
    if len(rows) > 1:
        rows[1, 2] = np.nan
        rows[2, [0, 5]] = -np.inf, 3
        rows[3] = 0
    packed, scales, dense = matrices(n, shape[-1], bits, group)
    attributes = {"k": k, "block": block, "rescale": "none", "n": n, "bits": bits, "group": group}
    expected = reference(x, packed, scales, **attributes)
    model = op_model("SparseMatMulNBits", x, {"w": onnx_weights(packed, bits), "scales": scales}, **attributes)
    got = run_body(model, x, level)
    assert got.dtype == dtype and got.shape == (*shape[:-1], sum(n))
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.isfinite(got), finite)
    clean = np.where(np.isfinite(x), x, 0)
    allowed = tolerance(clean, dense, bits, group, np.where(finite, expected, 0))
    error = np.abs(got.astype(np.float64) - expected)[finite]
    assert (error <= allowed[finite]).all(), (error / allowed[finite]).max()


@pytest.mark.parametrize(("bits", "products"), [(4, 1), (8, 2)])
def test_body_stays_packed_in_onnx_runtime(op_model, tmp_path, bits, products):
    """The weights are not unpacked when a session is made: DequantizeLinear and MatMul become MatMulNBits of 4 bits."""
    x = np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32)
    packed, scales, _ = matrices([64], 64, bits, 32)
    attributes = {"k": 64, "block": 0, "rescale": "none", "n": [64], "bits": bits, "group": 32}
    model = op_model("SparseMatMulNBits", x, {"w": onnx_weights(packed, bits), "scales": scales}, **attributes)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
    kernels = [{a.name: a.i for a in node.attribute}["bits"] for node in nodes if node.op_type == "MatMulNBits"]
    assert kernels == [4] * products
    assert not {"DequantizeLinear", "BitShift", "MatMul", "Gemm"} & {node.op_type for node in nodes}


def test_torch_op_is_the_reference():
    x = torch.randn(2, 5, 70)
    packed, scales, dense = matrices([65], 70, 4, 32)
    got = matmul_nbits(x, torch.from_numpy(packed), torch.from_numpy(scales), 65, 4, 32).numpy()
    expected = reference(x.numpy(), packed, scales, 70, 0, "none", [65], 4, 32)
    assert (np.abs(got - expected) <= bound(x.numpy(), dense, 4, 32)).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_torch_op_passes_opcheck(bits):
    x = torch.randn(2, 40, requires_grad=True)
    packed, scales, _ = matrices([9], 40, bits, 32)
    torch.library.opcheck(matmul_nbits, (x, torch.from_numpy(packed), torch.from_numpy(scales), 9, bits, 32))


def test_gradient_is_that_of_the_dequantised_product():
    x = torch.randn(3, 40, requires_grad=True)
    packed, scales, dense = matrices([9], 40, 8, 16)
    y = matmul_nbits(x, torch.from_numpy(packed), torch.from_numpy(scales), 9, 8, 16)
    y.sum().backward()
    np.testing.assert_allclose(x.grad.numpy(), np.tile(dense[0].sum(0), (3, 1)), rtol=1e-4, atol=1e-5)


def test_operands_that_do_not_fit_are_refused():
    packed, scales, _ = matrices([9], 40, 4, 32)
    with pytest.raises(UsageError, match=r"expected \[41, 32\]"):
        reference(np.zeros((1, 41), np.float32), packed, scales, 41, 0, "none", [9], 4, 32)
    with pytest.raises(UsageError, match=r"expected float16 \[3, 64\]"):
        matmul_nbits(torch.zeros(1, 40), torch.from_numpy(packed), torch.from_numpy(scales), 9, 4, 16)
    with pytest.raises(UsageError, match="4 or 8 bits"):
        matmul_nbits(torch.zeros(1, 40), torch.from_numpy(packed), torch.from_numpy(scales), 9, 5, 32)


@settings(max_examples=15, deadline=None)
@given(OUTPUTS, st.sampled_from([4, 8]), st.integers(0, 24), st.integers(0, 99))
def test_property_body_is_the_reference(op_model, run_body, n, bits, k, seed):
    x = np.random.default_rng(seed).normal(size=(2, 24)).astype(np.float32)
    packed, scales, dense = matrices(n, 24, bits, 16, seed)
    attributes = {"k": k, "block": 0, "rescale": "none", "n": n, "bits": bits, "group": 16}
    model = op_model("SparseMatMulNBits", x, {"w": onnx_weights(packed, bits), "scales": scales}, **attributes)
    error = np.abs(run_body(model, x) - reference(x, packed, scales, **attributes))
    assert (error <= bound(x, dense, bits, 16)).all()
