"""GatherNBits on a GPU (:mod:`qsparse_export.ops.gather_nbits` has the definition): rows of an n-bit embedding."""

from __future__ import annotations

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from qsparse_export.runtimes.tvm.gpu.float_bits import NOT_A_NUMBER
from qsparse_export.runtimes.tvm.gpu.output_major import OutputMajor
from qsparse_export.runtimes.tvm.gpu.program import Program, check_sizes
from qsparse_export.runtimes.tvm.gpu.workgroup import THREADS, assign, kernel, threads, when


def gather_nbits(*, n: int, k: int, bits: int, group: int, dtype: str = "float32") -> Program:
    """ids int64 [m], w and scales of n rows (:class:`OutputMajor`) to y [m, k] of ``dtype``.

    An id outside 0..n-1 gives a row of NaN: a kernel cannot end a call with an error. UsageError for other bits or groups.
    """
    check_sizes(k, dtype)
    rows = OutputMajor(k, bits, group)

    def body() -> None:
        m = tirx.Var("m", "int32")
        ids = T.arg("ids", T.buffer((m,), "int64"))
        w = T.arg("w", T.buffer((n, rows.units), rows.dtype))
        scales = T.arg("scales", T.buffer((n, rows.groups), "uint16"))
        y = T.arg("y", T.buffer((m, k), dtype))
        with threads(m, -(-k // THREADS)) as (row, tile, thread):
            column = T.bind(tile * THREADS + thread)
            with when(column < k):
                wanted = T.bind(ids[row])
                is_there = T.bind(tirx.all(wanted >= T.int64(0), wanted < T.int64(n)))
                taken = T.bind(T.Cast("int32", T.Select(is_there, wanted, T.int64(0))))
                unit = T.bind(T.Cast("uint32", w[taken, column // rows.unit_codes]))
                code = rows.code(unit, column % rows.unit_codes)
                value = T.bind(T.Cast("float32", code) * rows.scale(scales, taken, column))
                bits_of_row = T.Select(is_there, T.reinterpret("uint32", value), T.uint32(NOT_A_NUMBER))
                assign(y, T.Cast(dtype, T.reinterpret("float32", bits_of_row)), row, column)

    return Program((kernel("gather_nbits", body),), ("ids", "w", "scales"), ("y",))
