from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qsparse_export.errors import UsageError
from qsparse_export.ops import topk_sparsify
from qsparse_export.ops.sparse_matmul import reference

EPS = 2.0**-24


def weights(k: int, n: int, dtype: type = np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(k, n)).astype(dtype)


def test_reference_is_a_masked_product():
    x = np.random.default_rng(1).normal(size=(2, 3, 40)).astype(np.float32)
    w = weights(40, 12)
    masked = topk_sparsify.reference(x, 12).astype(np.float64)
    np.testing.assert_array_equal(reference(x, w, 12, 0, "none", [7, 5]), (masked @ w).astype(np.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("level", ["off", "all"])
@pytest.mark.parametrize(
    ("shape", "n", "k", "block"),
    [((10,), [3], 4, 0), ((2, 3, 96), [128, 5, 0], 40, 0), ((2, 3, 90), [13, 13], 16, 32), ((0, 64), [64, 3], 10, 0)],
)
def test_body_is_the_reference(op_model, run_body, dtype, level, shape, n, k, block):
    x = np.random.default_rng(2).normal(size=shape).astype(dtype)
    w = weights(shape[-1], sum(n), dtype)
    expected = reference(x, w, k, block, "none", n)
    got = run_body(op_model("SparseMatMul", x, {"w": w}, k=k, block=block, rescale="none", n=n), x, level)
    assert got.dtype == dtype and got.shape == (*shape[:-1], sum(n))
    size = np.abs(x.astype(np.float64)) @ np.abs(w.astype(np.float64))
    eps = EPS if dtype == np.float32 else 2.0**-11
    assert (np.abs(got.astype(np.float64) - expected) <= (shape[-1] + 4) * eps * size + 2.0**-24).all()


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=4), st.integers(0, 24), st.integers(0, 99))
def test_property_body_is_the_reference(op_model, run_body, n, k, seed):
    x = np.random.default_rng(seed).normal(size=(2, 24)).astype(np.float32)
    w = weights(24, sum(n), seed=seed)
    got = run_body(op_model("SparseMatMul", x, {"w": w}, k=k, block=0, rescale="none", n=n), x)
    size = np.abs(x.astype(np.float64)) @ np.abs(w.astype(np.float64))
    assert (np.abs(got - reference(x, w, k, 0, "none", n)) <= 28 * EPS * size).all()


def test_operands_that_do_not_fit_are_refused():
    with pytest.raises(UsageError, match=r"expected float32 \[24, 5\]"):
        reference(np.zeros((1, 24), np.float32), weights(23, 5), 24, 0, "none", [5])
