"""GatherNBits on a GPU (:mod:`qsparse_export.ops.gather_nbits` has the definition): rows of an n-bit embedding."""

from __future__ import annotations

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from qsparse_export.runtimes.tvm.gpu.float_bits import NOT_A_NUMBER
from qsparse_export.runtimes.tvm.gpu.output_major import OutputMajor
from qsparse_export.runtimes.tvm.gpu.program import Program, check_sizes
from qsparse_export.runtimes.tvm.gpu.workgroup import THREADS, assign, kernel, threads, when


def gather_nbits(*, n: int, k: int, bits: int, group: int, dtype: str = "float32", ids_dtype: str = "int64") -> Program:
    """ids [m] of ``ids_dtype``, w and scales of n rows (:class:`OutputMajor`) to y [m, k] of ``dtype``.

    Ids are int32 for WebGPU, which has no int64. An id outside 0..n-1 gives a row of NaN: a kernel cannot end a call with an
    error. UsageError for other bits or groups.
    """
    check_sizes(k, dtype)
    rows = OutputMajor(k, bits, group)

    def body() -> None:
        m = tirx.Var("m", "int32")
        ids = T.arg("ids", T.buffer((m,), ids_dtype))
        w = T.arg("w", T.buffer((n, rows.units), rows.dtype))
        scales = T.arg("scales", T.buffer((n, rows.scale_units), rows.scale_dtype))
        y = T.arg("y", T.buffer((m, k), dtype))
        with threads(m, -(-k // THREADS)) as (row, tile, thread):
            column = T.bind(tile * THREADS + thread)
            with when(column < k):
                wanted, zero = T.bind(ids[row]), tirx.const(0, ids_dtype)
                is_there = T.bind(tirx.all(wanted >= zero, wanted < tirx.const(n, ids_dtype)))
                taken = T.bind(T.Cast("int32", T.Select(is_there, wanted, zero)))
                unit = T.bind(T.Cast("uint32", w[taken, column // rows.unit_codes]))
                code = rows.code(unit, column % rows.unit_codes)
                value = T.bind(T.Cast("float32", code) * rows.scale(scales, taken, column))
                bits_of_row = T.Select(is_there, T.reinterpret("uint32", value), T.uint32(NOT_A_NUMBER))
                assign(y, T.Cast(dtype, T.reinterpret("float32", bits_of_row)), row, column)

    return Program((kernel("gather_nbits", body),), ("ids", "w", "scales"), ("y",))
