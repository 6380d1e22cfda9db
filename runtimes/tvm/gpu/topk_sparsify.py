"""TopKSparsify on a GPU: exactly k per row or block of channels, the lowest index of equal ones, NaN always kept.

Blocks of few channels: a thread counts who is before its channel. Wider ones and rows: the k-th largest magnitude by
radix, four bits at a time from the most significant ones on, with counts of each thread in shared memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from qsparse_export.ops import topk_sparsify as op
from qsparse_export.runtimes.tvm.gpu import float_bits
from qsparse_export.runtimes.tvm.gpu.float_bits import wide
from qsparse_export.runtimes.tvm.gpu.program import Program, check_sizes
from qsparse_export.runtimes.tvm.gpu.workgroup import (
    THREADS,
    assign,
    barrier,
    ceil_div,
    kernel,
    reduced,
    shared,
    sums_before,
    threads,
    variable,
    when,
)

MOST_RANKED = 64
"""Channels of a block, up to which each is compared with all others."""
DIGIT_BITS = 4
DIGITS = 1 << DIGIT_BITS
COUNT_WORDS = DIGITS // 2
"""Two counts of 16 bits to a word."""

_ValueAt = Callable[[tirx.Expr], tirx.Expr]
"""The channel's value, from its place in the block of channels."""


def topk_sparsify(*, k_in: int, k: int, block: int = 0, rescale: str = "none", dtype: str = "float32") -> Program:
    """x [m, k_in] of ``dtype`` to y of the same; k, block and rescale as the op has them.

    UsageError when the attributes contradict each other.
    """
    check_sizes(k_in, dtype)
    op.check_attributes(k, block, rescale, k_in)
    kernels = selection(k_in=k_in, k=k, block=block, rescale=rescale, dtype=dtype, result="y")
    return Program(kernels, ("x",), ("y",))


def masked(k_in: int, k: int, block: int, rescale: str, dtype: str) -> tuple[tuple[tirx.PrimFunc, ...], str]:
    """The kernels with which a product begins, and the tensor that they leave its masked activations in: "x" where these
    attributes select nothing. UsageError when they contradict each other.
    """
    check_sizes(k_in, dtype)
    op.check_attributes(k, block, rescale, k_in)
    if k == (block or k_in) and rescale == "none":
        return (), "x"
    return selection(k_in=k_in, k=k, block=block, rescale=rescale, dtype=dtype, result="masked"), "masked"


def selection(*, k_in: int, k: int, block: int, rescale: str, dtype: str, result: str) -> tuple[tirx.PrimFunc, ...]:
    """The kernels from "x" to the tensor named ``result``; "selected" is scratch where it is rescaled."""
    unit = block if 0 < block < k_in else k_in
    is_rescaled = rescale == "l2"
    select = _ranked if unit <= MOST_RANKED else _radix
    kernels = [select(k_in, unit, k, dtype, "selected" if is_rescaled else result)]
    if is_rescaled:
        kernels.append(_rescaled(k_in, dtype, result))
    return tuple(kernels)


def _key(value: tirx.Expr) -> tirx.Expr:
    """uint32 of the order of the magnitudes; NaN counts as infinity."""
    return T.min(float_bits.magnitude(value), T.uint32(float_bits.INFINITY))


def _ranked(k_in: int, unit: int, k: int, dtype: str, result: str) -> tirx.PrimFunc:
    units, units_of_block = -(-k_in // unit), THREADS // unit

    def body() -> None:
        m = tirx.Var("m", "int32")
        x = T.arg("x", T.buffer((m, k_in), dtype))
        y = T.arg(result, T.buffer((m, k_in), dtype))
        with threads(ceil_div(m * units, units_of_block)) as (block, _, thread):
            keys = shared((THREADS,), "uint32")
            of_block = T.bind(thread // unit)
            lane = T.bind(thread % unit)
            number = T.bind(T.min(block * units_of_block + of_block, m * units - 1))
            row, channel = T.bind(number // units), T.bind(number % units * unit + lane)
            is_mine = T.bind(
                tirx.all(of_block < units_of_block, block * units_of_block + of_block < m * units, channel < k_in)
            )
            value = T.bind(x[row, T.min(channel, k_in - 1)])
            # A lane beyond the row's end comes last and ranks below all, so that it never counts.
            key = T.bind(T.Select(is_mine, _key(wide(value)), T.uint32(0)))
            assign(keys, key, thread)
            barrier()
            rank = variable("int32", 0)
            with T.serial(0, unit) as other:
                others = T.bind(keys[T.min(of_block * unit + other, THREADS - 1)])
                is_before = tirx.any(others > key, tirx.all(others == key, other < lane))
                assign(rank, rank[0] + T.Select(is_before, T.int32(1), T.int32(0)))
            with when(is_mine):
                is_kept = tirx.any(rank[0] < k, float_bits.is_nan(wide(value)))
                assign(y, T.Select(is_kept, value, tirx.const(0, dtype)), row, channel)

    return kernel("topk_ranked", body)


def _radix(k_in: int, unit: int, k: int, dtype: str, result: str) -> tirx.PrimFunc:
    units, rounds = -(-k_in // unit), -(-unit // THREADS)

    def body() -> None:
        m = tirx.Var("m", "int32")
        x = T.arg("x", T.buffer((m, k_in), dtype))
        y = T.arg(result, T.buffer((m, k_in), dtype))
        with threads(m * units) as (block, _, thread):
            row, begin = T.bind(block // units), T.bind(block % units * unit)
            count = T.bind(T.min(k_in - begin, unit))

            def value_at(i: tirx.Expr) -> tirx.Expr:
                return x[row, begin + i]

            threshold, room = _kth_largest(value_at, count, T.min(count, k), rounds, thread)
            last = _last_tie(value_at, count, threshold, room, rounds, thread)
            with T.serial(0, rounds) as r:
                i = T.bind(r * THREADS + thread)
                with when(i < count):
                    value = T.bind(value_at(i))
                    key = T.bind(_key(wide(value)))
                    is_kept = tirx.any(
                        key > threshold, tirx.all(key == threshold, i <= last), float_bits.is_nan(wide(value))
                    )
                    assign(y, T.Select(is_kept, value, tirx.const(0, dtype)), row, begin + i)

    return kernel("topk_radix", body)


def _kth_largest(
    value_at: _ValueAt, count: tirx.Expr, k: tirx.Expr, rounds: int, thread: tirx.Var
) -> tuple[tirx.Expr, tirx.Expr]:
    """(threshold uint32, room int32): keys above the threshold are kept, and ``room`` of those equal to it."""
    counts = shared((COUNT_WORDS, THREADS), "uint32")
    of_lanes = shared((COUNT_WORDS, THREADS // COUNT_WORDS), "uint32")
    totals = shared((DIGITS,), "int32")
    prefix, wanted = variable("uint32", 0), variable("int32", k)
    lanes = THREADS // COUNT_WORDS
    with T.serial(0, 32 // DIGIT_BITS) as step:
        shift = T.bind(T.Cast("uint32", (32 - DIGIT_BITS) - DIGIT_BITS * step))
        for word in range(COUNT_WORDS):
            assign(counts, 0, word, thread)
        with T.serial(0, rounds) as r:
            i = T.bind(r * THREADS + thread)
            with when(i < count):
                digits = T.bind(_key(wide(value_at(i))) >> shift)
                with when(digits >> T.uint32(DIGIT_BITS) == prefix[0]):
                    digit = T.bind(digits & T.uint32(DIGITS - 1))
                    word = T.bind(T.Cast("int32", digit >> T.uint32(1)))
                    one = T.uint32(1) << ((digit & T.uint32(1)) * T.uint32(16))
                    assign(counts, counts[word, thread] + one, word, thread)
        barrier()
        word, lane = T.bind(thread // lanes), T.bind(thread % lanes)
        sum_of_lane = variable("uint32", 0)
        for i in range(THREADS // lanes):
            assign(sum_of_lane, sum_of_lane[0] + counts[word, lane + lanes * i])
        assign(of_lanes, sum_of_lane[0], word, lane)
        barrier()
        with when(thread < DIGITS):
            total = variable("int32", 0)
            half = T.bind(T.Cast("uint32", thread % 2) * T.uint32(16))
            with T.serial(0, lanes) as i:
                of_lane = (of_lanes[thread // 2, i] >> half) & T.uint32(0xFFFF)
                assign(total, total[0] + T.Cast("int32", of_lane))
            assign(totals, total[0], thread)
        barrier()
        chosen = variable("int32", -1)
        with T.serial(0, DIGITS) as i, when(chosen[0] < 0):
            total_of_digit = T.bind(totals[(DIGITS - 1) - i])
            with T.If(wanted[0] <= total_of_digit):
                with T.Then():
                    assign(chosen, (DIGITS - 1) - i)
                with T.Else():
                    assign(wanted, wanted[0] - total_of_digit)
        assign(prefix, prefix[0] << T.uint32(DIGIT_BITS) | T.Cast("uint32", chosen[0]))
    return T.bind(prefix[0]), T.bind(wanted[0])


def _last_tie(
    value_at: _ValueAt,
    count: tirx.Expr,
    threshold: tirx.Expr,
    room: tirx.Expr,
    rounds: int,
    thread: tirx.Var,
) -> tirx.Expr:
    """int32: the channel up to which keys equal to the threshold are kept; -1 for none. A thread looks at neighbours."""
    last = shared((1,), "int32")
    with when(thread == 0):
        assign(last, -1)
    own = variable("int32", 0)

    @contextmanager
    def each_tie() -> Iterator[tirx.Var]:
        with T.serial(0, rounds) as r:
            i = T.bind(thread * rounds + r)
            with when(i < count), when(_key(wide(value_at(i))) == threshold):
                yield i

    with each_tie():
        assign(own, own[0] + 1)
    before, _ = sums_before(own[0], thread)
    seen = variable("int32", before)
    with each_tie() as i:
        assign(seen, seen[0] + 1)
        with when(seen[0] == room):
            assign(last, i)
    barrier()
    return T.bind(last[0])


def _rescaled(k_in: int, dtype: str, result: str) -> tirx.PrimFunc:
    """Of a row: divided by its L2 norm, or by the floor."""

    def body() -> None:
        m = tirx.Var("m", "int32")
        selected = T.arg("selected", T.buffer((m, k_in), dtype))
        y = T.arg(result, T.buffer((m, k_in), dtype))
        with threads(m) as (row, _, thread):
            squares = variable("float32", 0.0)
            rounds = -(-k_in // THREADS)
            with T.serial(0, rounds) as r, when(r * THREADS + thread < k_in):
                value = T.bind(wide(selected[row, r * THREADS + thread]))
                assign(squares, squares[0] + value * value)
            norm = T.bind(T.sqrt(reduced(squares[0], "float32", thread, lambda a, b: a + b)))
            divisor = T.bind(T.Select(norm < T.float32(op.NORM_FLOOR), T.float32(op.NORM_FLOOR), norm))
            with T.serial(0, rounds) as r, when(r * THREADS + thread < k_in):
                value = wide(selected[row, r * THREADS + thread])
                assign(y, T.Cast(dtype, value / divisor), row, r * THREADS + thread)

    return kernel("topk_rescale", body)
