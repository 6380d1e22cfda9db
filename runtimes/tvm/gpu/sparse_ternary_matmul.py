"""SparseTernaryMatMul and TernaryMatMul on a GPU: the steps in order, the GEMV for few rows and the GEMM for many."""

from __future__ import annotations

from collections.abc import Sequence

from tvm import tirx

from qsparse_export.errors import UsageError
from qsparse_export.formats.ternary import TILE_OUTPUTS
from qsparse_export.ops.topk_sparsify import check_attributes
from qsparse_export.runtimes.tvm.gpu import quantize_rows, ternary_gemm, ternary_gemv
from qsparse_export.runtimes.tvm.gpu.joined import join
from qsparse_export.runtimes.tvm.gpu.packed_bytes import Dot, plain_dot
from qsparse_export.runtimes.tvm.gpu.program import Program
from qsparse_export.runtimes.tvm.gpu.topk_sparsify import selection, selects

GEMM_ROWS = 8
"""From so many rows on the GEMM takes less: neighbouring rows have few inactive channels in common."""
LARGEST_K_IN = 2_000_000
"""So that sums of codes and the places in the list of active channels fit into int32."""


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
    kernels, masked = _masked(k_in, k, block, rescale, dtype)
    joined = join(n, TILE_OUTPUTS)
    parts = -(-k_in // ternary_gemv.SLICE_CHANNELS) if slices is None else slices
    kernels += (
        quantize_rows.listed_rows(k_in, masked, dtype),
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
    kernels, masked = _masked(k_in, k, block, rescale, dtype)
    joined = join(n, TILE_OUTPUTS)
    width = quantize_rows.words(k_in, ternary_gemm.STEP_WORDS)
    kernels += (
        quantize_rows.dense_rows(k_in, width, masked, dtype),
        ternary_gemm.products(k_in, width, joined, dtype, dot),
    )
    return Program(kernels, ("x", "w", "scales"), ("y",))


def _masked(k_in: int, k: int, block: int, rescale: str, dtype: str) -> tuple[tuple[tirx.PrimFunc, ...], str]:
    """The kernels that select, and the tensor that they leave it in."""
    check_attributes(k, block, rescale, k_in)
    if not 0 < k_in <= LARGEST_K_IN:
        raise UsageError(f"there are {k_in} inputs; a GPU kernel takes 1 to {LARGEST_K_IN}")
    if not selects(k_in, k, block, rescale):
        return (), "x"
    return selection(k_in=k_in, k=k, block=block, rescale=rescale, dtype=dtype, result="masked"), "masked"
