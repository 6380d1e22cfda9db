"""What the CUDA kernels are checked with: the cases of the CPU kernels that an emulator gets through, and the sizes at
which these kernels change what they do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import quantize_cases
import sparse_matmul_cases
import sparse_ternary_cases
import topk_cases
from kernel_inputs import as_type, magnitudes
from quantize_cases import Quantize
from sparse_matmul_cases import SparseMatMul, integer_weights
from sparse_ternary_cases import SparseTernary
from ternary_cases import ternary_weights
from topk_cases import TopK

ELEMENTS = 5_000
"""Of x, in a case that is taken over from the CPU kernels."""
PRODUCTS = 300_000
"""Rows times inputs times outputs of such a case."""


def topk(rng: np.random.Generator) -> Iterator[TopK]:
    """Units of at most 32 channels go to warps, wider ones to blocks, 256 channels a round."""
    yield from [case for case in topk_cases.cases(rng) if case.x.size <= ELEMENTS][::4]
    for dtype in (np.float32, np.float16):
        for width, block in ((2730, 31), (2730, 32), (2730, 33), (300, 255), (300, 256), (600, 257), (1, 0), (32, 0)):
            for kind in ("normal", "ties", "nan"):
                x = as_type(magnitudes(rng, 3, width, kind), dtype)
                for k in sorted({0, 1, (block or width) // 2, (block or width) - 1, block or width}):
                    yield TopK(x, k, block)
        yield TopK(as_type(magnitudes(rng, 1, 11008, "ties"), dtype), 4403)
        yield TopK(as_type(magnitudes(rng, 2, 2730, "normal"), dtype), 1092, 0, True)


def quantize(rng: np.random.Generator) -> Iterator[Quantize]:
    """Rows of 256 channels a round."""
    yield from (case for case in quantize_cases.cases(rng) if case.x.size <= ELEMENTS)
    for width in (1023, 1024, 1025, 2730):
        yield Quantize(magnitudes(rng, 2, width, "halves"))


def _products(case: SparseTernary | SparseMatMul, outputs: int) -> int:
    return case.x.size * outputs


def sparse_ternary(rng: np.random.Generator) -> Iterator[SparseTernary]:
    """Below 8 rows the GEMV (512 outputs a block, fours of active channels), from 8 on the GEMM (64 rows, 128 channels)."""
    for case in sparse_ternary_cases.cases(rng):
        if case.x.size <= ELEMENTS and _products(case, sum(map(len, case.matrices))) <= PRODUCTS:
            yield case
    for dtype in (np.float32, np.float16):
        for n in (1, 127, 128, 129, 511, 512, 513):
            x = as_type(magnitudes(rng, 2, 130, "normal"), dtype)
            for k in (0, 1, 2, 3, 4, 5, 52, 130):  # densities 0..1, and every remainder of a four
                yield SparseTernary(x, (ternary_weights(rng, n, 130, "normal"),), k)
        for kind in ("normal", "ties", "nan", "outlier"):
            x = as_type(magnitudes(rng, 3, 2730, kind), dtype)
            weights = tuple(ternary_weights(rng, n, 2730, kind) for n in (130, 1))
            for k in (1092, 2730):
                yield SparseTernary(x, weights, k)
        for m in (7, 8, 9, 63, 64, 65):
            for width in (1, 127, 128, 129):
                x = as_type(magnitudes(rng, m, width, "normal"), dtype)
                weights = tuple(ternary_weights(rng, n, width, "normal") for n in (5, 0, 129))
                yield SparseTernary(x, weights, max(1, width // 2))
        x = as_type(magnitudes(rng, 9, 2730, "mixed"), dtype)
        yield SparseTernary(x, (ternary_weights(rng, 33, 2730, "normal"),), 1638, rescale=True)
        for m in (1, 8):
            x = as_type(magnitudes(rng, m, 70, "normal"), dtype)
            yield SparseTernary(x, (ternary_weights(rng, 2730, 70, "normal"),), 28)
    same = np.full((1, 11008), 3, np.float32)  # the largest sums
    yield SparseTernary(same, (np.ones((3, 11008), np.int8),), 11008)
    yield SparseTernary(same.repeat(8, 0), (-np.ones((3, 11008), np.int8),), 11008)


def sparse_matmul(rng: np.random.Generator) -> Iterator[SparseMatMul]:
    """Of few rows a warp takes 32 channels of a group at a time, and 256 outputs of 4 bits or 128 of 8. The GEMM, of float16
    from 8 rows on and of float32 from 32: 64 rows, 128 outputs, 64 channels of float16 or 32 of float32.
    """
    for case in sparse_matmul_cases.cases(rng):
        if case.weights.group and case.x.size <= ELEMENTS and _products(case, sum(case.weights.outputs)) <= PRODUCTS:
            yield replace(case, fixed_point=False)
    for dtype in (np.float32, np.float16):
        for bits, group in ((4, 32), (4, 7), (4, 33), (8, 128), (8, 31), (8, 1)):
            for n in (1, 63, 64, 65, 127, 128, 129, 255, 256, 257):
                width = (1, 31, 32, 33, 130)[n % 5]
                weights = integer_weights(rng, (n,), width, bits, group)
                for k in sorted({0, width // 3, width}):
                    x = as_type(magnitudes(rng, 2, width, "normal"), dtype)
                    yield SparseMatMul(x, weights, k, fixed_point=False)
            x = as_type(magnitudes(rng, 1, 70, "normal"), dtype)
            yield SparseMatMul(x, integer_weights(rng, (2730,), 70, bits, group), 28, fixed_point=False)
            weights = integer_weights(rng, (65, 1), 2730, bits, group)
            for kind in ("normal", "sparse", "nan and inf"):
                x = as_type(magnitudes(rng, 2, 2730, kind), dtype)
                yield SparseMatMul(x, weights, 1092, fixed_point=False)
        yield from _many_rows(rng, dtype)


def _many_rows(rng: np.random.Generator, dtype: type) -> Iterator[SparseMatMul]:
    fewest = {np.float16: 8, np.float32: 32}[dtype]
    sizes = [
        (1, (1,), 32),
        (15, (63, 0, 65), 7),
        (16, (64, 64), 16),
        (17, (128,), 128),
        (31, (129,), 31),
        (33, (5, 130), 32),
        (63, (127,), 64),
        (64, (1, 1, 1), 1),
        (65, (192,), 65),
        (127, (257,), 128),
        (130, (64, 1), 33),
    ]
    for bits in (4, 8):
        for number, (width, n, group) in enumerate(sizes):
            m = (fewest - 1, fewest, fewest + 1, 63, 64, 65)[(number + bits) % 6]
            weights = integer_weights(rng, n, width, bits, group)
            for k in (width // 3, width):
                x = as_type(magnitudes(rng, m, width, "normal"), dtype)
                yield SparseMatMul(x, weights, k, fixed_point=False)
        for kind in ("normal", "ties", "sparse", "nan and inf"):  # slices, where the GPU is large
            for group, width in ((32, 1025), (128, 1100), (1100, 1100)):
                x = as_type(magnitudes(rng, fewest + 1, width, kind), dtype)
                yield SparseMatMul(x, integer_weights(rng, (65, 2), width, bits, group), 440, fixed_point=False)
        x = as_type(magnitudes(rng, fewest, 96, "normal"), dtype)
        infinite = x.copy()
        infinite[1, 40], infinite[2, 95] = np.inf, -np.inf
        yield SparseMatMul(infinite, integer_weights(rng, (130,), 96, bits, 32), 96, fixed_point=False)
        yield SparseMatMul(x, integer_weights(rng, (130,), 96, bits, 32), 12, 32, True, fixed_point=False)
        same = np.full((fewest, 2730), 100, dtype)  # the largest sums of products
        yield SparseMatMul(same, integer_weights(rng, (3,), 2730, bits, 2730), 2730, fixed_point=False)


OPS = {
    "topk": (topk, 500),
    "quantize": (quantize, 300),
    "sparse_ternary": (sparse_ternary, 200),
    "sparse_matmul": (sparse_matmul, 480),
}
"""Cases of each op, and a lower bound of their number, so that a filter that lets nothing pass is noticed."""

NAMES = {
    "topk": "TopKSparsify",
    "quantize": "quantiser",
    "sparse_ternary": "SparseTernaryMatMul",
    "sparse_matmul": "SparseMatMulNBits",
}
"""What reports call them. TernaryMatMul is SparseTernaryMatMul of one matrix (test_ort_ops.py)."""

_SELECTION = {"topk_by_warp", "topk_by_block", "rescale_rows"}
_TERNARY = {"quantize_active", "ternary_gemv", "ternary_finish", "quantize_rows", "ternary_gemm"}
_NBITS = {"nbits_gemv", "nbits_finish", "nbits_gemm_half", "nbits_gemm_float"}
KERNELS = {
    "topk": _SELECTION,
    "quantize": {"quantize_rows<float>"},
    "sparse_ternary": _SELECTION | _TERNARY,
    "sparse_matmul": _SELECTION | _NBITS,
}
"""What the cases of each op launch: for every type that there is, where none is named."""
