"""Products with a matrix that is read whole, output by output, on a GPU: the head, in float32 or in 4 and 8 bits.

32 threads read neighbouring weights of one output, for one row of activations or for some at a time, and add up what they
have in shared memory.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from qsparse_export.runtimes.tvm.gpu.float_bits import nan_of_infinite, wide
from qsparse_export.runtimes.tvm.gpu.group_sums import GROUPS, LANES
from qsparse_export.runtimes.tvm.gpu.output_major import OutputMajor
from qsparse_export.runtimes.tvm.gpu.program import Program, check_sizes
from qsparse_export.runtimes.tvm.gpu.workgroup import (
    added,
    assign,
    barrier,
    ceil_div,
    kernel,
    local,
    shared,
    threads,
    when,
)

MANY_ROWS = 8
"""Rows for which a weight is read once, where there are many."""

SHARING = LANES // MANY_ROWS
"""Threads that add up what 32 have for a row."""

_Weights = Callable[[tirx.Expr, tirx.Expr], list[tuple[tirx.Expr, tirx.Expr]]]
"""(output, unit) to the channels of the unit, each with its weight as a float32."""


def dense_matmul(*, k_in: int, n: int, dtype: str = "float32", rows: int = 1) -> Program:
    """x [m, k_in] and w [n, k_in] of ``dtype`` to y [m, n]; ``rows`` of x share what is read of w."""
    check_sizes(k_in, dtype)

    def body() -> None:
        m = tirx.Var("m", "int32")
        x = T.arg("x", T.buffer((m, k_in), dtype))
        w = T.arg("w", T.buffer((n, k_in), dtype))
        y = T.arg("y", T.buffer((m, n), dtype))

        def weights(output: tirx.Expr, unit: tirx.Expr) -> list[tuple[tirx.Expr, tirx.Expr]]:
            return [(unit, T.bind(wide(w[output, unit])))]

        _products(x, y, (m, k_in, n, rows), k_in, weights, lambda value: value, dtype)

    return Program((kernel("dense_matmul", body),), ("x", "w"), ("y",))


def dense_matmul_nbits(*, k_in: int, n: int, bits: int, group: int, dtype: str = "float32", rows: int = 1) -> Program:
    """x [m, k_in] of ``dtype``, w and scales of n outputs (:class:`OutputMajor`) to y [m, n]; ``rows`` as above.

    Activations are not rounded to 16 bits. UsageError for other bits or groups.
    """
    check_sizes(k_in, dtype)
    packed = OutputMajor(k_in, bits, group)

    def body() -> None:
        m = tirx.Var("m", "int32")
        x = T.arg("x", T.buffer((m, k_in), dtype))
        w = T.arg("w", T.buffer((n, packed.units), packed.dtype))
        scales = T.arg("scales", T.buffer((n, packed.scale_units), packed.scale_dtype))
        y = T.arg("y", T.buffer((m, n), dtype))

        def weights(output: tirx.Expr, unit: tirx.Expr) -> list[tuple[tirx.Expr, tirx.Expr]]:
            codes = T.bind(T.Cast("uint32", w[output, unit]))
            scale = T.bind(packed.scale(scales, output, unit * packed.unit_codes))
            found = []
            for place in range(packed.unit_codes):
                # Behind the last channel weights are 0.
                channel = T.min(unit * packed.unit_codes + place, k_in - 1)
                found.append((channel, T.bind(T.Cast("float32", packed.code(codes, place)) * scale)))
            return found

        _products(x, y, (m, k_in, n, rows), packed.units, weights, nan_of_infinite, dtype)

    return Program((kernel("dense_matmul_nbits", body),), ("x", "w", "scales"), ("y",))


def _products(
    x: tirx.Buffer,
    y: tirx.Buffer,
    sizes: tuple[tirx.Var, int, int, int],
    units: int,
    weights: _Weights,
    taken: Callable[[tirx.Expr], tirx.Expr],
    dtype: str,
) -> None:
    """``sizes`` are m, k_in, n and the rows of a block; ``taken`` is what a product makes of an activation first."""
    m, _, n, rows = sizes
    with threads(ceil_div(m, rows), -(-n // GROUPS)) as (block, tile, thread):
        group, lane = T.bind(thread // LANES), T.bind(thread % LANES)
        output = T.bind(T.min(tile * GROUPS + group, n - 1))
        own = [T.bind(T.min(block * rows + i, m - 1)) for i in range(rows)]
        total = local(rows, "float32", 0.0)
        with T.serial(0, -(-units // LANES)) as step, when(step * LANES + lane < units):
            for channel, weight in weights(output, T.bind(step * LANES + lane)):
                for i, row in enumerate(own):
                    value = T.bind(wide(x[row, channel]))
                    assign(total, total[i] + taken(value) * weight, i)
        slots, sums = shared((GROUPS, rows, LANES), "float32"), shared((GROUPS, rows, SHARING), "float32")
        for i in range(rows):
            assign(slots, total[i], group, i, lane)
        barrier()
        with when(lane < rows * SHARING):
            row_of, share = T.bind(lane // SHARING), T.bind(lane % SHARING)
            assign(
                sums,
                added([slots[group, row_of, SHARING * i + share] for i in range(LANES // SHARING)]),
                group,
                row_of,
                share,
            )
        barrier()
        with when(tirx.all(lane < rows, block * rows + lane < m, tile * GROUPS + group < n)):
            result = added([sums[group, lane, i] for i in range(SHARING)])
            assign(y, T.Cast(dtype, result), block * rows + lane, output)
