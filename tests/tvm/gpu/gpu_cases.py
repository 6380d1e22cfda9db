"""What the GPU kernels are checked with: the sizes at which they change what they do, and rows of every kind in each case."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from evidence import STANDARD_HEAD, STANDARD_NORM, largest_share
from kernel_inputs import KINDS, as_type, magnitudes
from quantize_cases import quantize_reference
from sparse_matmul_cases import SparseMatMul, Weights, integer_weights
from ternary_cases import ternary_weights

from qsparse_export.formats import ternary
from qsparse_export.ops import ternary_matmul
from qsparse_export.ops import topk_sparsify as topk_op
from qsparse_export.runtimes.tvm.gpu.program import Program
from qsparse_export.runtimes.tvm.gpu.quantize_rows import quantize_rows
from qsparse_export.runtimes.tvm.gpu.sparse_matmul_nbits import sparse_matmul_nbits
from qsparse_export.runtimes.tvm.gpu.sparse_ternary_matmul import sparse_ternary_gemm, sparse_ternary_gemv
from qsparse_export.runtimes.tvm.gpu.topk_sparsify import topk_sparsify

EPS = 2.0**-24


def every_kind(rng: np.random.Generator, width: int, dtype: type = np.float32) -> np.ndarray:
    """A row of each kind; then one of the largest quantised values of both signs."""
    rows = [magnitudes(rng, 1, width, kind) for kind in KINDS]
    rows.append(np.where(np.arange(width) % 2, -127, 127).astype(np.float32)[None])
    return as_type(np.concatenate(rows), dtype)


@dataclass(frozen=True)
class Case:
    """A program, what it is run on, and a check of all its tensors, which gives the largest error as a share of the allowed.

    ``also``: another op that the program is.
    """

    label: str
    program: Program
    inputs: dict[str, np.ndarray]
    check: Callable[[dict[str, np.ndarray]], float]
    also: str = ""


_OPS = {
    "topk": "TopKSparsify",
    "quantize": "quantiser",
    "sparse_ternary_gemv": "SparseTernaryMatMul",
    "sparse_ternary_gemm": "SparseTernaryMatMul",
    "nbits": "SparseMatMulNBits",
    "RMSNormalization": STANDARD_NORM,
    "MatMul": STANDARD_HEAD,
}
"""By the first word of a case's label, where that is no op of ours."""


def op_of(case: Case) -> str:
    """What the report calls the op, or both."""
    word = case.label.split()[0]
    return ", ".join(filter(None, (_OPS.get(word, word), case.also)))


def topk_case(x: np.ndarray, k: int, block: int = 0, rescale: str = "none") -> Case:
    program = topk_sparsify(k_in=x.shape[1], k=k, block=block, rescale=rescale, dtype=x.dtype.name)
    return Case(
        f"topk {x.dtype} {x.shape} k {k} block {block} {rescale}",
        program,
        {"x": x},
        lambda tensors: check_masked(x, tensors["y"], k, block, rescale),
    )


def check_masked(x: np.ndarray, y: np.ndarray, k: int, block: int, rescale: str) -> float:
    """Bit for bit, but for the order in which squares are added up; the largest error, as a share of what is allowed."""
    expected = topk_op.reference(x, k, block, rescale)
    if rescale == "none":
        np.testing.assert_array_equal(y, expected)
        assert not np.signbit(y[(y == 0) & (x != 0)]).any(), "what is not kept is +0"
        return 0.0
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(y), ~number)
    truth = expected[number].astype(np.float64)
    # A root halves the relative error of the sum, to which every square and every addition contributes. WebGPU may take
    # subnormal numbers for 0, also those that a small norm would make normal.
    flushed = 2.0**-126 / topk_op.NORM_FLOOR
    allowed = np.abs(truth) * (EPS * (x.shape[1] + 8) + np.finfo(x.dtype).eps) + flushed
    allowed += np.finfo(x.dtype).smallest_subnormal
    return largest_share(np.abs(y[number] - truth), allowed)


def quantize_case(x: np.ndarray) -> Case:
    def check(tensors: dict[str, np.ndarray]) -> float:
        q, gamma = quantize_reference(x.astype(np.float32))
        found = tensors["q"].view(np.int8)
        np.testing.assert_array_equal(found[:, : x.shape[1]], q)
        assert not found[:, x.shape[1] :].any(), "the last word is padded with zeros"
        np.testing.assert_array_equal(tensors["gamma"], np.stack([gamma, gamma / np.float32(127)], axis=1))
        np.testing.assert_array_equal(tensors["counts"], np.stack([q.sum(1, dtype=np.int32), (q != 0).sum(1)], axis=1))
        return 0.0

    return Case(f"quantize {x.dtype} {x.shape}", quantize_rows(k_in=x.shape[1], dtype=x.dtype.name), {"x": x}, check)


def ternary_case(
    x: np.ndarray,
    matrices: Sequence[np.ndarray],
    k: int,
    block: int = 0,
    rescale: str = "none",
    make: Callable[..., Program] = sparse_ternary_gemv,
    **options: object,
) -> Case:
    """``matrices`` int8 [n, k_in] each."""
    n = [len(weights) for weights in matrices]
    scales = np.linspace(0.01, 0.3, len(n)).astype(np.float32)
    packed = np.ascontiguousarray(np.concatenate([ternary.pack(weights) for weights in matrices], axis=1))
    program = make(k_in=x.shape[1], n=n, k=k, block=block, rescale=rescale, dtype=x.dtype.name, **options)

    def check(tensors: dict[str, np.ndarray]) -> float:
        masked = tensors.get("masked", x)
        share = check_masked(x, masked, k, block, rescale) if masked is not x else 0.0
        expected = [
            ternary_matmul.reference(masked, ternary.pack(weights), scales[i : i + 1], len(weights))
            for i, weights in enumerate(matrices)
        ]
        np.testing.assert_array_equal(tensors["y"], np.concatenate(expected, axis=1))
        return share

    label = f"{make.__name__} {x.dtype} {x.shape} n {n} k {k} block {block} {rescale} {options}"
    is_dense = (k, block, rescale, len(n)) == (x.shape[1], 0, "none", 1)
    inputs = {"x": x, "w": packed.view(np.uint32), "scales": scales}
    return Case(label, program, inputs, check, also="TernaryMatMul" if is_dense else "")


def nbits_case(x: np.ndarray, weights: Weights, k: int, block: int = 0, rescale: str = "none", **options: int) -> Case:
    bits = {3: 8, 4: 4}[weights.type]
    program = sparse_matmul_nbits(
        k_in=x.shape[1],
        n=weights.outputs,
        bits=bits,
        group=weights.group,
        k=k,
        block=block,
        rescale=rescale,
        dtype=x.dtype.name,
        **options,
    )
    inputs = {"x": x, "w": weights.rows.view(np.uint32), "scales": weights.scales.view(np.uint32)}
    truth = SparseMatMul(x, weights, k, block, rescale == "l2", fixed_point=False)
    label = f"nbits {bits} group {weights.group} {x.dtype} {x.shape} n {weights.outputs} k {k} block {block} {rescale} {options}"
    return Case(label, program, inputs, lambda tensors: truth.check(tensors["y"]))


def cases(rng: np.random.Generator, dtype: type) -> Iterator[Case]:
    """Of all ops, for activations of one type."""
    yield from _topk(rng, dtype)
    for width in (1, 3, 5, 256, 1023, 1025):
        yield quantize_case(every_kind(rng, width, dtype))
    yield from _ternary(rng, dtype)
    yield from _nbits(rng, dtype)


def _topk(rng: np.random.Generator, dtype: type) -> Iterator[Case]:
    """Up to 64 channels compete by rank, more by radix, 256 a round."""
    for width, block, k in (
        (1, 0, 1),
        (1, 0, 0),
        (63, 0, 62),
        (64, 0, 1),
        (65, 0, 32),
        (255, 0, 255),
        (256, 0, 0),
        (257, 0, 100),
        (2730, 0, 1092),
        (100, 32, 16),
        (70, 7, 3),
        (5, 9, 5),
        (300, 65, 20),
        (600, 256, 255),
        (130, 64, 0),
    ):
        yield topk_case(every_kind(rng, width, dtype), k, block)
    for width, block, k in ((257, 0, 100), (100, 32, 16)):
        yield topk_case(every_kind(rng, width, dtype), k, block, "l2")


def _ternary(rng: np.random.Generator, dtype: type) -> Iterator[Case]:
    """The GEMV: fours of active channels, 512 outputs a block, 512 channels a slice. The GEMM: 64 rows, 64 channels."""
    for width, n, k, slices in (
        (1, (1,), 1, None),
        (2, (127,), 1, 1),
        (31, (128, 0, 1), 31, 3),
        (130, (129, 5), 0, None),
        (130, (511,), 5, 2),
        (257, (513,), 103, None),
        (1025, (3, 130), 1025, None),
        (1025, (130,), 410, 7),
    ):
        matrices = [ternary_weights(rng, outputs, width, "normal") for outputs in n]
        yield ternary_case(every_kind(rng, width, dtype), matrices, k, slices=slices)
    matrices = [ternary_weights(rng, outputs, 257, "normal") for outputs in (0, 130, 64)]
    yield ternary_case(every_kind(rng, 257, dtype), matrices, 16, 32, "l2")
    for rows, width, n, k in (
        (8, 1, (1,), 1),
        (15, 63, (127,), 20),
        (63, 64, (128, 0, 1), 64),
        (64, 65, (129,), 0),
        (65, 129, (5, 130), 50),
        (130, 300, (257,), 120),
    ):
        x = np.concatenate([every_kind(rng, width, dtype) for _ in range(-(-rows // (len(KINDS) + 1)))])[:rows]
        matrices = [ternary_weights(rng, outputs, width, "normal") for outputs in n]
        yield ternary_case(x, matrices, k, make=sparse_ternary_gemm)
    yield ternary_case(
        every_kind(rng, 70, dtype), [ternary_weights(rng, 130, 70, "one")], 30, 32, "l2", sparse_ternary_gemm
    )
    same = as_type(np.full((2, 11008), -3, np.float32), dtype)  # the largest sums
    for make in (sparse_ternary_gemv, sparse_ternary_gemm):
        yield ternary_case(same, [np.ones((3, 11008), np.int8), -np.ones((2, 11008), np.int8)], 11008, make=make)


def _nbits(rng: np.random.Generator, dtype: type) -> Iterator[Case]:
    """32 words a block: 256 outputs of 4 bits, 128 of 8; groups that divide the channels and that do not."""
    for width, n, k, bits, group, slices in (
        (1, (1,), 1, 4, 32, None),
        (2, (63,), 1, 8, 1, 2),
        (31, (64, 0, 1), 31, 4, 7, None),
        (130, (65,), 0, 8, 128, None),
        (130, (257,), 50, 4, 33, 3),
        (257, (129,), 103, 8, 31, None),
        (513, (3, 130), 513, 4, 32, None),
        (1025, (130,), 410, 8, 128, 5),
        (1025, (200,), 500, 4, 128, None),
    ):
        yield nbits_case(_summable(rng, width, dtype), integer_weights(rng, n, width, bits, group), k, slices=slices)
    yield nbits_case(_summable(rng, 257, dtype), integer_weights(rng, (130, 64), 257, 4, 32), 16, 32, "l2")


def _summable(rng: np.random.Generator, width: int, dtype: type) -> np.ndarray:
    """Rows whose sums of products fit into float32, and one with a single Inf."""
    x = every_kind(rng, width)
    x[KINDS.index("huge")] *= np.float32(1e-10)
    infinite = magnitudes(rng, 1, width, "normal")
    infinite[0, width // 2] = np.inf
    return as_type(np.concatenate([x, infinite]), dtype)
