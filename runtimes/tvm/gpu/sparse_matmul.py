"""SparseMatMul on a GPU: float matrices, channel-major; only the weight rows of channels that are not zero are read."""

from __future__ import annotations

from collections.abc import Sequence

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from qsparse_export.runtimes.tvm.gpu.float_bits import wide
from qsparse_export.runtimes.tvm.gpu.group_sums import GROUPS, LANES, add_groups
from qsparse_export.runtimes.tvm.gpu.joined import Joined, each_output, join
from qsparse_export.runtimes.tvm.gpu.program import Program, slices_of
from qsparse_export.runtimes.tvm.gpu.sparse_matmul_nbits import TOGETHER, listed
from qsparse_export.runtimes.tvm.gpu.topk_sparsify import masked
from qsparse_export.runtimes.tvm.gpu.workgroup import assign, ceil_div, kernel, local, threads, when

THREAD_OUTPUTS = 4
TILE = LANES * THREAD_OUTPUTS


def sparse_matmul(
    *,
    k_in: int,
    n: Sequence[int],
    k: int,
    block: int = 0,
    rescale: str = "none",
    dtype: str = "float32",
    slices: int | None = None,
) -> Program:
    """x [m, k_in] and w [k_in, sum(n)] of ``dtype`` to y [m, sum(n)], with the attributes of the op.

    ``slices`` of the active channels are worked on by blocks of their own; None: as many as leave each 512 channels. Raises
    UsageError when the attributes contradict each other.
    """
    kernels, source = masked(k_in, k, block, rescale, dtype)
    parts, joined = slices_of(k_in, slices), join((sum(n),), 1)
    kernels += (
        listed(k_in, source, dtype),
        _products(k_in, joined, parts, dtype),
        _finish(joined, parts, dtype),
    )
    return Program(kernels, ("x", "w"), ("y",))


def _products(k_in: int, joined: Joined, slices: int, dtype: str) -> tirx.PrimFunc:
    """From "w", "channels", "values" and "counts" to "sums" float32 [m, slices, outputs].

    Each group of threads takes neighbouring channels of the list.
    """
    outputs, entries = joined.outputs, slices * GROUPS

    def body() -> None:
        m = tirx.Var("m", "int32")
        w = T.arg("w", T.buffer((k_in, outputs), dtype))
        channels = T.arg("channels", T.buffer((m, k_in), "int32"))
        values = T.arg("values", T.buffer((m, k_in), "float32"))
        counts = T.arg("counts", T.buffer((m, 2), "int32"))
        sums = T.arg("sums", T.buffer((m, slices, outputs), "float32"))
        with threads(m * slices, -(-outputs // TILE)) as (part, tile, thread):
            row, slice_ = T.bind(part // slices), T.bind(part % slices)
            group, lane = T.bind(thread // LANES), T.bind(thread % LANES)
            place = T.bind(slice_ * GROUPS + group)
            begin, end = T.bind(counts[row, 0] * place // entries), T.bind(counts[row, 0] * (place + 1) // entries)
            columns = [T.bind(T.min(tile * TILE + i * LANES + lane, outputs - 1)) for i in range(THREAD_OUTPUTS)]
            total = local(THREAD_OUTPUTS, "float32", 0.0)
            with T.serial(0, ceil_div(end - begin, TOGETHER)) as step:
                for i in range(TOGETHER):
                    entry = T.bind(begin + step * TOGETHER + i)
                    with when(entry < end):
                        channel, value = T.bind(channels[row, entry]), T.bind(values[row, entry])
                        for number, column in enumerate(columns):
                            assign(total, total[number] + value * wide(w[channel, column]), number)
            for result, value in add_groups(total, THREAD_OUTPUTS, "float32", group, lane, thread):
                column = T.bind(tile * TILE + result.number * LANES + result.lane)
                with when(column < outputs):
                    assign(sums, value, row, slice_, column)

    return kernel("float_gemv", body)


def _finish(joined: Joined, slices: int, dtype: str) -> tirx.PrimFunc:
    """Adds up the slices: from "sums" to "y"."""

    def body() -> None:
        m = tirx.Var("m", "int32")
        sums = T.arg("sums", T.buffer((m, slices, joined.columns), "float32"))
        y = T.arg("y", T.buffer((m, joined.outputs), dtype))
        with each_output(joined, m, slices, sums, "float32") as (row, output, total):
            assign(y, T.Cast(dtype, total), row, output)

    return kernel("float_finish", body)
