"""The products on this machine's instruction sets, against the references of the C++ kernels and with their cases."""

import numpy as np
import pytest
from dense_matmul_cases import DenseMatMul
from evidence import EXECUTED, Evidence
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_inputs import KINDS, magnitudes
from prim_func_calls import LANES, call, compiled
from product_cases import (
    DEFAULT,
    dense_ternary_cases,
    head_cases,
    kernel_of,
    nbits_cases,
    op_names,
    tensors_of,
    ternary_cases,
)
from sparse_matmul_cases import SparseMatMul, integer_weights
from sparse_ternary_cases import SparseTernary
from ternary_cases import ternary_weights

from qsparse_export.formats import nbits
from qsparse_export.runtimes.tvm.tiling import Tiling

EVERY = 13
"""Of the cases of the C++ kernels: each shape is compiled anew."""
every_lanes = pytest.mark.parametrize("lanes", LANES, ids=[lanes.name for lanes in LANES])


def run(lanes, case, tiling=DEFAULT):
    function, static = kernel_of(case, tiling)
    return call(compiled(function, lanes, **static), *tensors_of(case))


@every_lanes
@pytest.mark.parametrize("cases", [ternary_cases, dense_ternary_cases, nbits_cases, head_cases])
def test_cases_of_the_kernels(lanes, cases, evidence):
    found = cases()
    assert len(found) > 50
    some = found[::EVERY]
    share = max(case.check(run(lanes, case)) for case in some)
    evidence(Evidence(op_names(some), "TVM", lanes.name, EXECUTED, error_share=share))


@every_lanes
@pytest.mark.parametrize(
    "tiling",
    [Tiling(1), Tiling(2, columns=False), Tiling(3, rows=16), Tiling(7, columns=False, rows=64), Tiling(2, outputs=5)],
)
def test_any_tiling_gives_the_same_bits(lanes, tiling):
    """More parts than blocks leave some without work."""
    rng = np.random.default_rng(4)
    for outputs in ((1100, 130),):
        matrices = tuple(ternary_weights(rng, n, 300, "normal") for n in outputs)
        for rows in (1, 9):
            case = SparseTernary(magnitudes(rng, rows, 300, "normal"), matrices, 140)
            case.check(run(lanes, case, tiling))
            nbits_case = SparseMatMul(case.x, integer_weights(rng, outputs, 300, 4, 32), 140)
            nbits_case.check(run(lanes, nbits_case, tiling))
    head = DenseMatMul(case.x, rng.integers(-8, 8, (67, 300)).astype(np.int8), _scales(rng, 67, 300, 32), 4, 32)
    head.check(run(lanes, head, tiling))


@every_lanes
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(0, 10), kind=st.sampled_from(KINDS))
@settings(max_examples=40, deadline=None)
def test_any_rows_of_one_shape(lanes, seed, rows, kind):
    """The weights that one compiled node has, with whatever comes along."""
    rng = np.random.default_rng(seed)
    x = magnitudes(rng, rows, 301, kind)
    matrices = tuple(ternary_weights(rng, n, 301, kind) for n in (131, 40))
    ternary = SparseTernary(x, matrices, 33)
    ternary.check(run(lanes, ternary))
    if kind != "huge":  # sums beyond float32
        head = DenseMatMul(x, rng.integers(-8, 8, (67, 301)).astype(np.int8), _scales(rng, 67, 301, 104), 4, 104)
        head.check(run(lanes, head))


def _scales(rng, n, width, group):
    return rng.uniform(0.001, 0.2, (n, nbits.group_count(width, group))).astype(np.float16)


@every_lanes
def test_a_rescaled_row_agrees_to_the_norms_rounding(lanes):
    """A norm that is rounded otherwise changes the scale by its last bits, and no integer of these rows."""
    rng = np.random.default_rng(5)
    x = magnitudes(rng, 9, 330, "normal")
    weights = ternary_weights(rng, 60, 330, "normal")
    case = SparseTernary(x, (weights,), 130, rescale=True)
    plain = SparseTernary(x, (weights,), 130)
    y, unscaled = run(lanes, case), run(lanes, plain)
    masked = np.sort(np.abs(x), axis=1)[:, -130:]
    norms = np.sqrt((masked.astype(np.float64) ** 2).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(y, unscaled / norms, rtol=2e-5)
