"""SparseMatMulNBits on a GPU: 4- and 8-bit channel-major weights with a scale for each group of channels, float32 sums.

Only the weight rows of channels that are not zero are read. Activations stay float32, they are not rounded to 16 bits.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from qsparse_export.errors import UsageError
from qsparse_export.formats import nbits
from qsparse_export.runtimes.tvm.gpu import float_bits
from qsparse_export.runtimes.tvm.gpu.float_bits import wide
from qsparse_export.runtimes.tvm.gpu.group_sums import GROUPS, LANES, add_groups
from qsparse_export.runtimes.tvm.gpu.joined import Joined, each_output, join
from qsparse_export.runtimes.tvm.gpu.program import Program, slices_of
from qsparse_export.runtimes.tvm.gpu.topk_sparsify import masked
from qsparse_export.runtimes.tvm.gpu.workgroup import (
    THREADS,
    assign,
    ceil_div,
    kernel,
    local,
    sums_before,
    threads,
    variable,
    when,
)

TOGETHER = 4
"""Weight words that a thread asks for before it uses the first."""


def sparse_matmul_nbits(
    *,
    k_in: int,
    n: Sequence[int],
    bits: int,
    group: int,
    k: int,
    block: int = 0,
    rescale: str = "none",
    dtype: str = "float32",
    slices: int | None = None,
) -> Program:
    """x [m, k_in], w, scales to y [m, sum(n)], with the attributes of the op.

    ``w`` is uint32 [k_in, words of a row]: the bytes of ``formats.nbits``, channel-major, the matrices side by side.
    ``scales`` is uint32 [groups, columns / 2]: the float16 of the format, two at a time. ``slices`` of the active channels are
    worked on by blocks of their own; None: as many as leave each 512 channels. Raises UsageError when the attributes
    contradict each other.
    """
    check_format(bits, group)
    kernels, source = masked(k_in, k, block, rescale, dtype)
    parts, joined = slices_of(k_in, slices), join(n, nbits.TILE_OUTPUTS)
    kernels += (
        listed(k_in, source, dtype),
        _products(k_in, joined, bits, group, parts),
        _finish(joined, parts, dtype),
    )
    return Program(kernels, ("x", "w", "scales"), ("y",))


def check_format(bits: int, group: int) -> None:
    """UsageError for weights that are none."""
    if bits not in nbits.BITS or group < 1:
        raise UsageError(
            f"SparseMatMulNBits: {bits} bits in groups of {group}; expected 4 or 8 bits and a positive group"
        )


def listed(k_in: int, source: str, dtype: str) -> tirx.PrimFunc:
    """From the tensor ``source`` to "channels" int32 and "values" float32 [m, k_in], those that are not zero in order, and
    "counts" int32 [m, 2]: how many are listed, and how many of them are NaN or Inf.
    """
    each = -(-k_in // THREADS)

    def body() -> None:
        m = tirx.Var("m", "int32")
        x = T.arg(source, T.buffer((m, k_in), dtype))
        channels = T.arg("channels", T.buffer((m, k_in), "int32"))
        values = T.arg("values", T.buffer((m, k_in), "float32"))
        counts = T.arg("counts", T.buffer((m, 2), "int32"))
        with threads(m) as (row, _, thread):
            own, bad = variable("int32", 0), variable("int32", 0)
            with T.serial(0, each) as i, when(thread * each + i < k_in):
                bits = T.bind(float_bits.magnitude(wide(x[row, thread * each + i])))
                assign(own, own[0] + T.Select(bits != T.uint32(0), T.int32(1), T.int32(0)))
                assign(bad, bad[0] + T.Select(bits >= T.uint32(float_bits.INFINITY), T.int32(1), T.int32(0)))
            before, listed = sums_before(own[0], thread)
            _, all_bad = sums_before(bad[0], thread)
            position = variable("int32", before)
            with T.serial(0, each) as i:
                channel = T.bind(thread * each + i)
                with when(channel < k_in):
                    value = T.bind(wide(x[row, channel]))
                    with when(float_bits.magnitude(value) != T.uint32(0)):
                        assign(channels, channel, row, position[0])
                        assign(values, value, row, position[0])
                        assign(position, position[0] + 1)
            with when(thread == 0):
                assign(counts, listed, row, 0)
                assign(counts, all_bad, row, 1)

    return kernel("nbits_active", body)


def _products(k_in: int, joined: Joined, bits: int, group: int, slices: int) -> tirx.PrimFunc:
    """From "w", "scales", "channels", "values" and "counts" to "sums" float32 [m, slices, columns].

    Each group of threads takes neighbouring channels of the list, and multiplies by the scales where a group of the
    weights ends: they are read once for all of its channels.
    """
    planes = 32 // bits
    words = joined.columns // planes
    unit = nbits.WORDS * planes
    entries = GROUPS * slices

    def body() -> None:
        m = tirx.Var("m", "int32")
        w = T.arg("w", T.buffer((k_in, words), "uint32"))
        scales = T.arg("scales", T.buffer((nbits.group_count(k_in, group), joined.columns // 2), "uint32"))
        channels = T.arg("channels", T.buffer((m, k_in), "int32"))
        values = T.arg("values", T.buffer((m, k_in), "float32"))
        counts = T.arg("counts", T.buffer((m, 2), "int32"))
        sums = T.arg("sums", T.buffer((m, slices, joined.columns), "float32"))
        with threads(m * slices, -(-words // LANES)) as (part, tile, thread):
            row, slice_ = T.bind(part // slices), T.bind(part % slices)
            of_block, lane = T.bind(thread // LANES), T.bind(thread % LANES)
            word = T.bind(T.min(tile * LANES + lane, words - 1))
            first_column = T.bind(word // nbits.WORDS * unit + word % nbits.WORDS)
            half = T.bind(T.Cast("uint32", first_column % 2) * T.uint32(16))
            place = T.bind(slice_ * GROUPS + of_block)
            begin, end = T.bind(counts[row, 0] * place // entries), T.bind(counts[row, 0] * (place + 1) // entries)
            total, piece = local(planes, "float32", 0.0), local(planes, "float32", 0.0)
            current = variable("int32", 0)

            def add_piece() -> None:
                for plane in range(planes):
                    scale = scales[current[0], (first_column + nbits.WORDS * plane) // 2] >> half
                    value = piece[plane] * float_bits.half_to_float(T.bind(scale & T.uint32(0xFFFF)))
                    assign(total, total[plane] + value, plane)
                    assign(piece, 0.0, plane)

            with T.serial(0, ceil_div(end - begin, TOGETHER)) as step:
                places = [T.bind(begin + step * TOGETHER + i) for i in range(TOGETHER)]
                rows = [T.bind(channels[row, T.min(entry, end - 1)]) for entry in places]
                loaded = [T.bind(w[channel, word]) for channel in rows]
                for entry, channel, weights in zip(places, rows, loaded, strict=True):
                    with when(channel // group != current[0]):
                        add_piece()
                        assign(current, channel // group)
                    value = T.bind(T.Select(entry < end, values[row, T.min(entry, end - 1)], T.float32(0)))
                    for plane in range(planes):
                        code = T.Cast("int32", weights << T.uint32(32 - bits - bits * plane)) >> (32 - bits)
                        assign(piece, piece[plane] + value * T.Cast("float32", code), plane)
            add_piece()
            for result, value in add_groups(total, planes, "float32", of_block, lane, thread):
                of_tile = result.lane // nbits.WORDS * unit + nbits.WORDS * result.number + result.lane % nbits.WORDS
                column = T.bind(tile * (LANES * planes) + of_tile)
                with when(column < joined.columns):
                    assign(sums, value, row, slice_, column)

    return kernel("nbits_gemv", body)


def _finish(joined: Joined, slices: int, dtype: str) -> tirx.PrimFunc:
    """Adds up the slices: from "sums" and "counts" to "y"."""

    def body() -> None:
        m = tirx.Var("m", "int32")
        counts = T.arg("counts", T.buffer((m, 2), "int32"))
        sums = T.arg("sums", T.buffer((m, slices, joined.columns), "float32"))
        y = T.arg("y", T.buffer((m, joined.outputs), dtype))
        with each_output(joined, m, slices, sums, "float32") as (row, output, total):
            bits = T.Select(counts[row, 1] > 0, T.uint32(float_bits.NOT_A_NUMBER), T.reinterpret("uint32", total))
            assign(y, T.Cast(dtype, T.reinterpret("float32", bits)), row, output)

    return kernel("nbits_finish", body)
