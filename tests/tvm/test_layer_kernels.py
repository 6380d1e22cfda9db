"""The kernels between the products, on this machine's instruction sets, against the references of the ops."""

import numpy as np
import pytest
import tvm
from evidence import EXECUTED, STANDARD_HEAD, STANDARD_NORM, Evidence, largest_share, share_within
from hypothesis import given, settings
from hypothesis import strategies as st
from prim_func_calls import LANES, call, compiled

from qsparse_export.formats import nbits
from qsparse_export.ops import add_rms_norm as add_rms_norm_op
from qsparse_export.ops import gated_activation as gated_activation_op
from qsparse_export.ops import gather_nbits as gather_nbits_op
from qsparse_export.ops import sparse_matmul as sparse_matmul_op
from qsparse_export.ops import topk_sparsify as topk_sparsify_op
from qsparse_export.runtimes.tvm.kernels.dense_matmul import dense_matmul
from qsparse_export.runtimes.tvm.kernels.gated_activation import gated_activation
from qsparse_export.runtimes.tvm.kernels.gather_nbits import gather_nbits
from qsparse_export.runtimes.tvm.kernels.rms_norm import add_rms_norm, rms_norm
from qsparse_export.runtimes.tvm.kernels.sparse_matmul import TILE, sparse_matmul
from qsparse_export.runtimes.tvm.kernels.topk_sparsify import topk_sparsify

EPS = np.finfo(np.float32).eps
SMALLEST = float(np.finfo(np.float32).smallest_subnormal)
every_lanes = pytest.mark.parametrize("lanes", LANES, ids=[lanes.name for lanes in LANES])
SIZES = (1, 8, 33)


@every_lanes
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_norms(lanes, n, rows, evidence):
    rng = np.random.default_rng(n)
    x, residual = rng.standard_normal((2, rows, n)).astype(np.float32)
    weight = rng.standard_normal(n).astype(np.float32)
    if rows > 3:
        x[1], residual[1] = 0, 0
        x[2, 0], x[3, n // 2] = np.nan, np.inf
    total, y = add_rms_norm_op.reference(x, residual, weight, 1e-5)
    tensors = [tvm.runtime.tensor(np.full((rows, n), np.nan, np.float32)) for _ in range(2)]
    given_tensors = [tvm.runtime.tensor(np.ascontiguousarray(array)) for array in (x, residual, weight)]
    compiled(add_rms_norm, lanes, n=n, epsilon=1e-5)(*given_tensors, *tensors)
    np.testing.assert_array_equal(tensors[0].numpy(), total)
    # n squares add up in float32, and the root halves their relative error.
    rtol = (n / 2 + 4) * EPS
    np.testing.assert_allclose(tensors[1].numpy(), y, rtol=rtol)
    plain = call(compiled(rms_norm, lanes, n=n, epsilon=1e-5), (total, weight), (rows, n))
    share = share_within(plain, y, rtol)
    evidence(Evidence(STANDARD_NORM, "TVM", lanes.name, EXECUTED, error_share=share))


@every_lanes
@pytest.mark.parametrize("activation", ["relu2", "silu"])
@pytest.mark.parametrize("n", SIZES)
def test_gated_activation(lanes, activation, n):
    rng = np.random.default_rng(n)
    special = [-np.inf, -100, -88, -87, -50, -1e-30, -0.0, 0, 1e-30, 1, 88, 89, 200, 1e19, np.inf, np.nan]
    x = np.resize(np.concatenate((special, rng.standard_normal(100) * 20)), (3, 2 * n)).astype(np.float32)
    y = call(compiled(gated_activation, lanes, n=n, activation=activation), (x,), (3, n))
    expected = gated_activation_op.reference(x, activation)
    # A subnormal exponential is off by half of the smallest number; times a gate of 100 and an "up" of 200.
    np.testing.assert_allclose(y, expected, rtol=8 * EPS, atol=2e4 * SMALLEST)


def test_the_exponential_keeps_its_precision_everywhere():
    """Through silu with a gate that runs over all magnitudes: relative error, not absolute."""
    gate = np.linspace(-110, 80, 4001, dtype=np.float32)
    x = np.concatenate((gate, np.ones_like(gate)))[None]
    for lanes in LANES:
        y = call(compiled(gated_activation, lanes, n=gate.size, activation="silu"), (x,), (1, gate.size))
        np.testing.assert_allclose(y, gated_activation_op.reference(x, "silu"), rtol=8 * EPS, atol=100 * SMALLEST)


@every_lanes
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("k", [1, 33, 64])
def test_gather_nbits(lanes, bits, k):
    rng = np.random.default_rng(k)
    codes = rng.integers(-(1 << bits - 1), 1 << bits - 1, (20, k)).astype(np.int8)
    w, scales = nbits.pack_outputs(codes, bits), rng.random((20, nbits.group_count(k, 16))).astype(np.float16)
    kernel = compiled(gather_nbits, lanes, n=20, k=k, bits=bits, group=16)
    for ids in ([], [3], [0, 19, 3, 3]):
        array = np.array(ids, np.int64)
        expected = gather_nbits_op.reference(array, w, scales, k, bits, 16)
        np.testing.assert_array_equal(call(kernel, (array, w, scales), expected.shape), expected)
    for bad in (-1, 20):
        with pytest.raises(RuntimeError, match="an id is not 0 to 19"):
            call(kernel, (np.array([0, bad], np.int64), w, scales), (2, k))


SELECTIONS = [(1, 1, 0), (1, 0, 0), (37, 10, 0), (37, 4, 8), (37, 0, 8), (64, 16, 32), (64, 64, 0), (50, 49, 0)]


def rows_with_ties(rng: np.random.Generator, k_in: int) -> np.ndarray:
    """Five rows: ties, all zero, a NaN, both infinities, and distinct values."""
    x = (rng.integers(-4, 5, (5, k_in)) / 3).astype(np.float32)
    x[1] = 0
    x[2, k_in // 2] = np.nan
    x[3, 0], x[3, -1] = np.inf, -np.inf
    x[4] = rng.standard_normal(k_in)
    return x


@every_lanes
@pytest.mark.parametrize(("k_in", "k", "block"), SELECTIONS)
@pytest.mark.parametrize("rescale", ["none", "l2"])
def test_topk_sparsify(lanes, k_in, k, block, rescale):
    x = rows_with_ties(np.random.default_rng(k_in + k), k_in)
    y = call(compiled(topk_sparsify, lanes, k_in=k_in, k=k, block=block, rescale=rescale), (x,), x.shape)
    expected = topk_sparsify_op.reference(x, k, block, rescale)
    if rescale == "none":
        np.testing.assert_array_equal(y, expected)
    else:
        np.testing.assert_allclose(y, expected, rtol=(k_in / 2 + 4) * EPS)


@every_lanes
@given(seed=st.integers(0, 2**32 - 1), k=st.sampled_from([0, 1, 5, 36, 37]), block=st.sampled_from([0, 8]))
@settings(max_examples=40, deadline=None)
def test_any_row_keeps_what_the_reference_keeps(lanes, seed, k, block):
    k = min(k, block or k)
    rng = np.random.default_rng(seed)
    x = rng.choice(np.array([0, -0.0, 1, -1, 2, 1e-40, np.inf, np.nan], np.float32), (3, 37))
    y = call(compiled(topk_sparsify, lanes, k_in=37, k=k, block=block, rescale="none"), (x,), x.shape)
    np.testing.assert_array_equal(y, topk_sparsify_op.reference(x, k, block, "none"))


@every_lanes
@pytest.mark.parametrize("outputs", [1, TILE - 1, TILE, TILE + 1, 3 * TILE + 37])
@pytest.mark.parametrize(("k_in", "k", "block"), [(1, 1, 0), (37, 10, 0), (37, 37, 0), (64, 16, 32), (64, 0, 0)])
def test_sparse_matmul(lanes, outputs, k_in, k, block, evidence):
    rng = np.random.default_rng(outputs)
    x = rows_with_ties(rng, k_in)
    w = (rng.standard_normal((k_in, outputs)) + 3).astype(np.float32)  # no 0: inf * 0 is NaN
    kernel = compiled(sparse_matmul, lanes, k_in=k_in, n=(outputs,), k=k, block=block, rescale="none")
    expected = sparse_matmul_op.reference(x, w, k, block, "none", (outputs,))
    bound = (k_in + 4) * EPS * (np.abs(np.nan_to_num(x, posinf=0, neginf=0)) @ np.abs(w))
    got = call(kernel, (x, w), expected.shape)
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(expected))
    finite = np.isfinite(expected)
    share = largest_share(np.abs(got[finite] - expected[finite]), bound[finite])
    np.testing.assert_array_equal(got[~finite], expected[~finite])
    evidence(Evidence("SparseMatMul", "TVM", lanes.name, EXECUTED, error_share=share))


@every_lanes
@pytest.mark.parametrize("n", [1, 3, 4, 5, 130])
@pytest.mark.parametrize("k_in", [1, 8, 37])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_dense_matmul(lanes, n, k_in, rows, evidence):
    rng = np.random.default_rng(n)
    x, w = rng.standard_normal((rows, k_in)).astype(np.float32), rng.standard_normal((n, k_in)).astype(np.float32)
    y = call(compiled(dense_matmul, lanes, k_in=k_in, n=n), (x, w), (rows, n))
    bound = (k_in + 4) * EPS * (np.abs(x) @ np.abs(w).T)
    share = largest_share(np.abs(y - x.astype(np.float64) @ w.astype(np.float64).T), bound)
    evidence(Evidence(STANDARD_HEAD, "TVM", lanes.name, EXECUTED, error_share=share))
