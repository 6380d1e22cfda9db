"""SparseMatMulNBits for many rows on a GPU: every channel is read, once for 64 rows.

Blocks of 64 rows and 64 outputs. Activations and weights, as float32, lie in shared memory for 16 channels at a time; a thread
adds up four rows of four outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from qsparse_export.formats import nbits
from qsparse_export.runtimes.tvm.gpu import float_bits
from qsparse_export.runtimes.tvm.gpu.float_bits import nan_of_infinite, wide
from qsparse_export.runtimes.tvm.gpu.joined import Joined, join
from qsparse_export.runtimes.tvm.gpu.program import Program
from qsparse_export.runtimes.tvm.gpu.sparse_matmul_nbits import check_format
from qsparse_export.runtimes.tvm.gpu.topk_sparsify import masked
from qsparse_export.runtimes.tvm.gpu.workgroup import (
    assign,
    barrier,
    ceil_div,
    kernel,
    local,
    shared,
    threads,
    when,
)

ROWS = 64
OUTPUTS = 64
STEP = 16
EACH = 4
"""Rows, and outputs, of a thread: neighbours are STEP apart."""

_Load = Callable[[tirx.Buffer, tirx.Expr, tirx.Expr, tirx.Expr], None]
"""(weights float32 [STEP, OUTPUTS] in shared memory, first channel, tile of outputs, thread): fills it."""


def sparse_matmul_nbits_gemm(
    *,
    k_in: int,
    n: Sequence[int],
    bits: int,
    group: int,
    k: int,
    block: int = 0,
    rescale: str = "none",
    dtype: str = "float32",
) -> Program:
    """As :func:`~qsparse_export.runtimes.tvm.gpu.sparse_matmul_nbits.sparse_matmul_nbits`, for many rows."""
    check_format(bits, group)
    kernels, source = masked(k_in, k, block, rescale, dtype)
    joined = join(n, nbits.TILE_OUTPUTS)
    kernels += (_products(k_in, joined, bits, group, source, dtype),)
    return Program(kernels, ("x", "w", "scales"), ("y",))


def _packed(w: tirx.Buffer, scales: tirx.Buffer, k_in: int, bits: int, group: int) -> _Load:
    tile_words, planes = OUTPUTS * bits // 32, 32 // bits

    def load(weights: tirx.Buffer, first: tirx.Expr, tile: tirx.Expr, thread: tirx.Expr) -> None:
        with when(thread < STEP * tile_words):
            place, word = T.bind(thread // tile_words), T.bind(thread % tile_words)
            channel = T.bind(T.min(first + place, k_in - 1))  # beyond the last one activations are 0
            codes = T.bind(w[channel, tile * tile_words + word])
            for plane in range(planes):
                column = T.bind(
                    word // nbits.WORDS * (nbits.WORDS * planes) + (nbits.WORDS * plane + word % nbits.WORDS)
                )
                pair = scales[channel // group, (tile * OUTPUTS + column) // 2]
                half = T.bind(pair >> T.Cast("uint32", column % 2 * 16) & T.uint32(0xFFFF))
                code = T.Cast("int32", codes << T.uint32(32 - bits - bits * plane)) >> (32 - bits)
                assign(weights, T.Cast("float32", code) * float_bits.half_to_float(half), place, column)

    return load


def _products(k_in: int, joined: Joined, bits: int, group: int, source: str, dtype: str) -> tirx.PrimFunc:
    """The kernel from the tensor ``source``, "w" and "scales" to "y"."""

    def bank(place: tirx.Expr, row: tirx.Expr) -> tirx.Expr:
        """Turned by the channel, so that threads which write along the channels hit other banks."""
        return (row + place) % ROWS

    def body() -> None:
        m = tirx.Var("m", "int32")
        x = T.arg(source, T.buffer((m, k_in), dtype))
        w = T.arg("w", T.buffer((k_in, joined.columns * bits // 32), "uint32"))
        scales = T.arg("scales", T.buffer((nbits.group_count(k_in, group), joined.columns // 2), "uint32"))
        y = T.arg("y", T.buffer((m, joined.outputs), dtype))
        with threads(ceil_div(m, ROWS), -(-joined.columns // OUTPUTS)) as (block, tile, thread):
            rows, weights = shared((STEP, ROWS), "float32"), shared((STEP, OUTPUTS), "float32")
            load = _packed(w, scales, k_in, bits, group)
            total = local(EACH * EACH, "float32", 0.0)
            own_row, own_output = T.bind(thread // STEP), T.bind(thread % STEP)
            with T.serial(0, -(-k_in // STEP)) as step:
                channel = T.bind(step * STEP + own_output)
                for i in range(EACH):
                    row = T.bind(own_row + i * STEP)
                    value = T.bind(wide(x[T.min(block * ROWS + row, m - 1), T.min(channel, k_in - 1)]))
                    inside = T.Select(channel < k_in, nan_of_infinite(value), T.float32(0))
                    assign(rows, inside, own_output, bank(own_output, row))
                load(weights, T.bind(step * STEP), tile, thread)
                barrier()
                with T.serial(0, STEP) as place:
                    values = [T.bind(rows[place, bank(place, own_row + i * STEP)]) for i in range(EACH)]
                    factors = [T.bind(weights[place, own_output + j * STEP]) for j in range(EACH)]
                    for i, value in enumerate(values):
                        for j, factor in enumerate(factors):
                            assign(total, total[i * EACH + j] + value * factor, i * EACH + j)
                barrier()
            for i in range(EACH):
                row = T.bind(block * ROWS + own_row + i * STEP)
                for matrix in joined.matrices:
                    for j in range(EACH):
                        output = T.bind(tile * OUTPUTS + (own_output + j * STEP) - matrix.first_column)
                        with when(tirx.all(row < m, output >= 0, output < matrix.outputs)):
                            assign(y, T.Cast(dtype, total[i * EACH + j]), row, matrix.first_output + output)

    return kernel("nbits_gemm", body)
