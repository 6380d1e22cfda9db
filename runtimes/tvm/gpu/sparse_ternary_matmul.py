"""SparseTernaryMatMul and TernaryMatMul on a GPU: the steps in order, the GEMV for few rows and the GEMM for many."""

from __future__ import annotations

from collections.abc import Sequence

from qsparse_export.formats.ternary import TILE_OUTPUTS
from qsparse_export.runtimes.tvm.gpu import quantize_rows, ternary_gemm, ternary_gemv
from qsparse_export.runtimes.tvm.gpu.joined import join
from qsparse_export.runtimes.tvm.gpu.packed_bytes import Dot, plain_dot
from qsparse_export.runtimes.tvm.gpu.program import Program, slices_of
from qsparse_export.runtimes.tvm.gpu.topk_sparsify import masked

GEMM_ROWS = 8
"""From so many rows on the GEMM takes less: neighbouring rows have few inactive channels in common."""


def sparse_ternary_gemv(
    *,
    k_in: int,
    n: Sequence[int],
    k: int,
    block: int = 0,
    rescale: str = "none",
    dtype: str = "float32",
    dot: Dot = plain_dot,
    slices: int | None = None,
) -> Program:
    """For up to GEMM_ROWS - 1 rows: x [m, k_in], w, scales to y [m, sum(n)], with the attributes of the op.

    ``w`` is uint32 [k_in, words of a row]: the bytes of ``formats.ternary``, the matrices side by side, four at a time.
    ``scales`` float32 [len(n)]. ``slices`` of the active channels are worked on by blocks of their own, so that a single row
    fills a GPU; None: as many as leave each 512 channels. Raises UsageError when the attributes contradict each other.
    """
    kernels, source = masked(k_in, k, block, rescale, dtype)
    joined = join(n, TILE_OUTPUTS)
    parts = slices_of(k_in, slices)
    kernels += (
        quantize_rows.listed_rows(k_in, source, dtype),
        ternary_gemv.products(k_in, joined, parts, dot),
        ternary_gemv.finish(joined, parts, dtype),
    )
    return Program(kernels, ("x", "w", "scales"), ("y",))


def sparse_ternary_gemm(
    *,
    k_in: int,
    n: Sequence[int],
    k: int,
    block: int = 0,
    rescale: str = "none",
    dtype: str = "float32",
    dot: Dot = plain_dot,
) -> Program:
    """For GEMM_ROWS rows or more, else as :func:`sparse_ternary_gemv`: every channel is read, once for 64 rows."""
    kernels, source = masked(k_in, k, block, rescale, dtype)
    joined = join(n, TILE_OUTPUTS)
    width = quantize_rows.words(k_in, ternary_gemm.STEP_WORDS)
    kernels += (
        quantize_rows.dense_rows(k_in, width, source, dtype),
        ternary_gemm.products(k_in, width, joined, dtype, dot),
    )
    return Program(kernels, ("x", "w", "scales"), ("y",))
