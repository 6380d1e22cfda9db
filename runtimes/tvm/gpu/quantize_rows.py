"""Absmax int8 quantisation of rows on a GPU, as dense rows or as lists of the channels that are not zero.

``gamma`` [m, 2] float32 is max(max|x|, 1e-5) of a row and a 127th of it, or twice NaN for a row that holds NaN or Inf, whose
values are all 0. ``counts`` [m, 2] int32 are the sum of a row's values, and how many of them are not 0. The formula is that of
:mod:`~qsparse_export.ops.ternary_matmul`: quotients are made of integers, and a product that is rounded to a whole number next
cannot be fused with anything.
"""

from __future__ import annotations

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from qsparse_export.ops.ternary_matmul import GAMMA_FLOOR
from qsparse_export.runtimes.tvm.gpu import float_bits
from qsparse_export.runtimes.tvm.gpu.float_bits import wide
from qsparse_export.runtimes.tvm.gpu.program import Program, check_sizes
from qsparse_export.runtimes.tvm.gpu.workgroup import (
    THREADS,
    assign,
    kernel,
    reduced,
    sums_before,
    threads,
    variable,
    when,
)

LARGEST = 127.0
CHANNEL_SHIFT = 8
"""A listed channel is a uint32: its number above the 8 bits of its value."""
FOUR = 4
"""Values in a word, and the multiple to which a list is padded with zeros of channel 0."""


def words(k_in: int, multiple: int = 1) -> int:
    """Words of a dense row of ``k_in`` values."""
    return -(-k_in // (FOUR * multiple)) * multiple


def quantize_rows(*, k_in: int, dtype: str = "float32") -> Program:
    """x [m, k_in] of ``dtype`` to q int32 [m, words(k_in)], four int8 to a word, lowest byte first, and gamma, counts."""
    check_sizes(k_in, dtype)
    return Program((dense_rows(k_in, words(k_in), "x", dtype),), ("x",), ("q", "gamma", "counts"))


def dense_rows(k_in: int, width: int, source: str, dtype: str) -> tirx.PrimFunc:
    """The kernel from the tensor ``source`` to "q" with rows of ``width`` words, "gamma" and "counts"."""

    def body() -> None:
        m = tirx.Var("m", "int32")
        x = T.arg(source, T.buffer((m, k_in), dtype))
        q = T.arg("q", T.buffer((m, width), "int32"))
        gamma = T.arg("gamma", T.buffer((m, 2), "float32"))
        counts = T.arg("counts", T.buffer((m, 2), "int32"))
        with threads(m) as (row, _, thread):
            row_gamma, inverse, is_usable = _gamma(x, row, k_in, thread)
            total, active = variable("int32", 0), variable("int32", 0)
            with T.serial(0, -(-width // THREADS)) as r:
                word = T.bind(r * THREADS + thread)
                with when(word < width):
                    packed = variable("int32", 0)
                    for i in range(FOUR):
                        channel = T.bind(word * FOUR + i)
                        value = T.bind(
                            T.Select(
                                tirx.all(channel < k_in, is_usable),
                                quantized(wide(x[row, T.min(channel, k_in - 1)]), inverse),
                                T.int32(0),
                            )
                        )
                        assign(packed, packed[0] | ((value & 255) << (8 * i)))
                        assign(total, total[0] + value)
                        assign(active, active[0] + T.Select(value != 0, T.int32(1), T.int32(0)))
                    assign(q, packed[0], row, word)
            _finish_row(gamma, counts, row, thread, row_gamma, total[0], reduced(active[0], "int32", thread, _add))

    return kernel("quantize_rows", body)


def listed_rows(k_in: int, source: str, dtype: str) -> tirx.PrimFunc:
    """The kernel from the tensor ``source`` to "active" uint32 [m, k_in rounded up to fours], "gamma" and "counts".

    Channels are listed in order, so that reads of neighbouring ones stay together.
    """
    each = -(-k_in // THREADS)

    def body() -> None:
        m = tirx.Var("m", "int32")
        x = T.arg(source, T.buffer((m, k_in), dtype))
        active = T.arg("active", T.buffer((m, FOUR * words(k_in)), "uint32"))
        gamma = T.arg("gamma", T.buffer((m, 2), "float32"))
        counts = T.arg("counts", T.buffer((m, 2), "int32"))
        with threads(m) as (row, _, thread):
            row_gamma, inverse, is_usable = _gamma(x, row, k_in, thread)

            def value_of(channel: tirx.Expr) -> tirx.Expr:
                value = quantized(wide(x[row, T.min(channel, k_in - 1)]), inverse)
                return T.bind(T.Select(tirx.all(channel < k_in, is_usable), value, T.int32(0)))

            total, own = variable("int32", 0), variable("int32", 0)
            with T.serial(0, each) as i:
                value = value_of(thread * each + i)
                assign(total, total[0] + value)
                assign(own, own[0] + T.Select(value != 0, T.int32(1), T.int32(0)))
            before, listed = sums_before(own[0], thread)
            position = variable("int32", before)
            with T.serial(0, each) as i:
                channel = T.bind(thread * each + i)
                value = value_of(channel)
                with when(value != 0):
                    number = T.Cast("uint32", channel) << T.uint32(CHANNEL_SHIFT)
                    assign(active, number | (T.Cast("uint32", value) & T.uint32(255)), row, position[0])
                    assign(position, position[0] + 1)
            padding = T.bind(listed + thread)
            with when(padding < (listed + (FOUR - 1)) // FOUR * FOUR):
                assign(active, 0, row, padding)
            _finish_row(gamma, counts, row, thread, row_gamma, total[0], listed)

    return kernel("quantize_active", body)


def quantized(x: tirx.Expr, inverse: tirx.Expr) -> tirx.Expr:
    """int32 in -128..127, ties to even."""
    rounded = T.nearbyint(inverse * x)
    return T.Cast("int32", T.max(T.min(rounded, T.float32(LARGEST)), T.float32(-1 - LARGEST)))


def _add(a: tirx.Expr, b: tirx.Expr) -> tirx.Expr:
    return a + b


def _gamma(x: tirx.Buffer, row: tirx.Var, k_in: int, thread: tirx.Var) -> tuple[tirx.Expr, tirx.Expr, tirx.Expr]:
    """(gamma's bits uint32, 127 / gamma, whether there is neither NaN nor Inf) of a row."""
    largest = variable("uint32", 0)
    with T.serial(0, -(-k_in // THREADS)) as r, when(r * THREADS + thread < k_in):
        assign(largest, T.max(largest[0], float_bits.magnitude(wide(x[row, r * THREADS + thread]))))
    bits = reduced(largest[0], "uint32", thread, T.max)
    is_usable = T.bind(bits < T.uint32(float_bits.INFINITY))
    floored = T.bind(T.max(bits, T.uint32(float_bits.bits_of(GAMMA_FLOOR))))
    inverse = T.bind(T.reinterpret("float32", float_bits.divided(T.uint32(float_bits.bits_of(LARGEST)), floored)))
    return T.bind(T.Select(is_usable, floored, T.uint32(float_bits.NOT_A_NUMBER))), inverse, is_usable


def _finish_row(
    gamma: tirx.Buffer,
    counts: tirx.Buffer,
    row: tirx.Var,
    thread: tirx.Var,
    gamma_bits: tirx.Expr,
    total: tirx.Expr,
    listed: tirx.Expr,
) -> None:
    sum_of_row = reduced(total, "int32", thread, _add)
    with when(thread == 0):
        bad = T.uint32(float_bits.NOT_A_NUMBER)
        # Of any number, for a bad row: a NaN has no mantissa to divide.
        usable = T.Select(gamma_bits == bad, T.uint32(float_bits.bits_of(1.0)), gamma_bits)
        step = float_bits.divided(usable, T.uint32(float_bits.bits_of(LARGEST)))
        assign(gamma, T.reinterpret("float32", gamma_bits), row, 0)
        assign(gamma, T.reinterpret("float32", T.Select(gamma_bits == bad, bad, step)), row, 1)
        assign(counts, sum_of_row, row, 0)
        assign(counts, listed, row, 1)
