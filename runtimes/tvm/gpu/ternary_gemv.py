"""Sparse ternary GEMV on a GPU: only the weight rows of active channels are read, 128 consecutive bytes by 32 threads."""

from __future__ import annotations

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from qsparse_export.runtimes.tvm.gpu import float_bits, quantize_rows
from qsparse_export.runtimes.tvm.gpu.group_sums import GROUPS, LANES, add_groups
from qsparse_export.runtimes.tvm.gpu.joined import Joined, each_output
from qsparse_export.runtimes.tvm.gpu.packed_bytes import Dot, transposed
from qsparse_export.runtimes.tvm.gpu.workgroup import assign, ceil_div, kernel, local, threads, variable, when

WORD_OUTPUTS = 16
CODES = 0x03030303


def products(k_in: int, joined: Joined, slices: int, dot: Dot) -> tirx.PrimFunc:
    """The kernel from "w", "active" and "counts" to "sums" int32 [m, slices, columns], of codes: weights plus one."""
    words = joined.columns // WORD_OUTPUTS

    def body() -> None:
        m = tirx.Var("m", "int32")
        w = T.arg("w", T.buffer((k_in, words), "uint32"))
        active = T.arg("active", T.buffer((m, quantize_rows.FOUR * quantize_rows.words(k_in)), "uint32"))
        counts = T.arg("counts", T.buffer((m, 2), "int32"))
        sums = T.arg("sums", T.buffer((m, slices, joined.columns), "int32"))
        with threads(m * slices, -(-words // LANES)) as (part, tile, thread):
            row, slice_ = T.bind(part // slices), T.bind(part % slices)
            group, lane = T.bind(thread // LANES), T.bind(thread % LANES)
            word = T.bind(T.min(tile * LANES + lane, words - 1))
            fours = T.bind(ceil_div(counts[row, 1], 4))
            begin, end = T.bind(fours * slice_ // slices), T.bind(fours * (slice_ + 1) // slices)
            total = local(WORD_OUTPUTS, "int32", 0)
            with T.serial(0, ceil_div(T.max(end - begin - group, 0), GROUPS)) as step:
                four = T.bind(begin + group + step * GROUPS)
                entries = [T.bind(active[row, four * 4 + i]) for i in range(4)]
                channels = [T.Cast("int32", entry >> T.uint32(quantize_rows.CHANNEL_SHIFT)) for entry in entries]
                own = transposed([T.bind(w[channel, word]) for channel in channels])
                values = variable("uint32", 0)
                for i, entry in enumerate(entries):
                    assign(values, values[0] | (entry & T.uint32(255)) << T.uint32(8 * i))
                for byte, word_of_byte in enumerate(own):
                    for plane in range(4):
                        codes = word_of_byte >> T.uint32(2 * plane) & T.uint32(CODES)
                        output = 4 * byte + plane
                        assign(total, dot(codes, values[0], total[output]), output)
            for place, value in add_groups(total, WORD_OUTPUTS, "int32", group, lane, thread):
                column = T.bind(tile * (LANES * WORD_OUTPUTS) + place.lane * WORD_OUTPUTS + place.number)
                with when(column < joined.columns):
                    assign(sums, value, row, slice_, column)

    return kernel("ternary_gemv", body)


def finish(joined: Joined, slices: int, dtype: str) -> tirx.PrimFunc:
    """The kernel that adds up the slices: from "sums", "counts", "gamma" and "scales" to "y"."""

    def body() -> None:
        m = tirx.Var("m", "int32")
        counts = T.arg("counts", T.buffer((m, 2), "int32"))
        gamma = T.arg("gamma", T.buffer((m, 2), "float32"))
        sums = T.arg("sums", T.buffer((m, slices, joined.columns), "int32"))
        scales = T.arg("scales", T.buffer((joined.count,), "float32"))
        y = T.arg("y", T.buffer((m, joined.outputs), dtype))
        with each_output(joined, m, slices, sums, "int32") as (row, output, total):
            scale = scales[joined.number_of(output)]
            assign(y, descaled(total - counts[row, 0], gamma[row, 1], scale, dtype), row, output)

    return kernel("ternary_finish", body)


def descaled(total: tirx.Expr, step: tirx.Expr, scale: tirx.Expr, dtype: str) -> tirx.Expr:
    """An integer sum as a result, by a row's gamma / 127: the float operations of the op, in its order. NaN where that is."""
    value = T.Cast("float32", total) * (step * scale)
    return T.Cast(dtype, T.Select(float_bits.is_nan(step), step, value))
