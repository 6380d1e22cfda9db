"""The cases of the C++ kernels as calls of PrimFuncs: which static values a node compiles in, and which tensors it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import dense_matmul_cases
import numpy as np
import sparse_matmul_cases
import sparse_ternary_cases
from dense_matmul_cases import DenseMatMul
from kernel_inputs import KINDS, magnitudes
from sparse_matmul_cases import SparseMatMul
from sparse_ternary_cases import SparseTernary
from ternary_cases import ternary_weights

from qsparse_export.formats import nbits
from qsparse_export.runtimes.tvm.kernels.dense_matmul_nbits import dense_matmul_nbits
from qsparse_export.runtimes.tvm.kernels.sparse_matmul_nbits import sparse_matmul_nbits
from qsparse_export.runtimes.tvm.kernels.sparse_ternary_matmul import sparse_ternary_matmul
from qsparse_export.runtimes.tvm.tiling import Tiling

DEFAULT = Tiling(parts=2)
Product = SparseTernary | SparseMatMul | DenseMatMul
_BITS = {3: 8, 4: 4}
"""QSK_INT8 and QSK_INT4 of qsk/status.h."""


def kernel_of(case: Product, tiling: Tiling = DEFAULT) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The function that makes the case's PrimFunc, and its static values."""
    width = case.x.shape[1]
    if isinstance(case, DenseMatMul):
        return dense_matmul_nbits, {
            "n": len(case.codes),
            "k_in": width,
            "bits": case.bits,
            "group": case.group,
            "tiling": tiling,
        }
    rescale = "l2" if case.rescale else "none"
    selection = {"k_in": width, "k": case.k, "block": case.block, "rescale": rescale, "tiling": tiling}
    if isinstance(case, SparseTernary):
        return sparse_ternary_matmul, {**selection, "n": tuple(len(matrix) for matrix in case.matrices)}
    weights = case.weights
    format_ = {"bits": _BITS[weights.type], "group": weights.group}
    return sparse_matmul_nbits, {**selection, "n": weights.outputs, **format_}


def op_names(cases: Sequence[Product]) -> str:
    """The ONNX ops, of which TernaryMatMul is SparseTernaryMatMul with one matrix and nothing selected."""
    names = {SparseTernary: "SparseTernaryMatMul", SparseMatMul: "SparseMatMulNBits", DenseMatMul: "DenseMatMulNBits"}
    ternary = [case for case in cases if isinstance(case, SparseTernary)]
    dense = [case for case in ternary if len(case.matrices) == 1 and case.k == case.x.shape[1] and not case.rescale]
    return ", ".join([*dict.fromkeys(names[type(case)] for case in cases), *(["TernaryMatMul"] if dense else [])])


def tensors_of(case: Product) -> tuple[tuple[np.ndarray, ...], tuple[int, int]]:
    """The inputs of the call, and the shape of its result."""
    rows = len(case.x)
    if isinstance(case, SparseTernary):
        return (case.x, case.packed(), case.scales), (rows, sum(len(matrix) for matrix in case.matrices))
    if isinstance(case, SparseMatMul):
        return (case.x, case.weights.rows, case.weights.scales), (rows, sum(case.weights.outputs))
    return (case.x, nbits.pack_outputs(case.codes, case.bits), case.scales), (rows, len(case.codes))


def ternary_cases() -> list[SparseTernary]:
    """Those in float32. Without rescaled rows: a norm rounded otherwise is allowed, and changes the last bits."""
    cases = sparse_ternary_cases.cases(np.random.default_rng(1))
    return [case for case in cases if case.x.dtype == np.float32 and not case.rescale and case.matrices]


def dense_ternary_cases() -> list[SparseTernary]:
    """One matrix and every channel: TernaryMatMul."""
    rng = np.random.default_rng(4)
    return [
        SparseTernary(magnitudes(rng, rows, width, kind), (ternary_weights(rng, outputs, width, "normal"),), width)
        for kind in KINDS
        for width, outputs in ((1, 1), (33, 128), (130, 200), (257, 513))
        for rows in (1, 9)
    ]


def nbits_cases() -> list[SparseMatMul]:
    """Those in float32 with integer weights."""
    cases = sparse_matmul_cases.cases(np.random.default_rng(2))
    return [case for case in cases if case.x.dtype == np.float32 and case.weights.group]


def head_cases() -> list[DenseMatMul]:
    """Those in float32."""
    return [case for case in dense_matmul_cases.cases(np.random.default_rng(3)) if case.x.dtype == np.float32]
