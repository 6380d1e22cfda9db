"""GatherNBits (:mod:`qsparse_export.ops.gather_nbits` has the definition): rows of an n-bit embedding, dequantised."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from qsparse_export.formats import nbits
from qsparse_export.runtimes.tvm.kernels.emit import for_rows
from qsparse_export.runtimes.tvm.lanes import Lanes


def gather_nbits(lanes: Lanes, *, n: int, k: int, bits: int, group: int) -> tirx.PrimFunc:
    """ids int64 [M], w uint8 [n, output_row_bytes(k)], scales float16 [n, groups] to y float32 [M, k].

    An id outside 0..n-1 ends the call with an error.
    """
    m = tirx.Var("m", "int64")
    half = tirx.const(1 << bits - 1, "int32")
    codes_of_byte = 8 // bits
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("gather_nbits")
        T.func_attr({"tirx.noalias": True})
        ids = T.arg("ids", T.buffer((m,), "int64"))
        w = T.arg("w", T.buffer((n, nbits.output_row_bytes(k, bits)), "uint8"))
        scales = T.arg("scales", T.buffer((n, nbits.group_count(k, group)), "float16"))
        y = T.arg("y", T.buffer((m, k), "float32"))
        with (
            T.serial(0, m) as row,
            T.Assert(T.And(ids[row] >= 0, ids[row] < n), f"GatherNBits: an id is not 0 to {n - 1}"),
        ):
            T.evaluate(0)

        def row_of(row: Any) -> None:
            taken = T.bind(ids[row])
            with T.serial(0, k) as c:
                byte = T.cast(w[taken, c // codes_of_byte], "int32")
                shift = T.cast(c % codes_of_byte * bits, "int32")
                code = T.bitwise_and(T.shift_right(byte, shift), tirx.const((1 << bits) - 1, "int32"))
                scale = T.cast(scales[taken, c // group], "float32")
                T.buffer_store(y, T.cast(code - half, "float32") * scale, [row, c])

        for_rows(m, row_of)
    return builder.get()
