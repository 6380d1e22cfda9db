"""The step before every sparse product: top-k selection of a row, and its int8 quantisation.

Sources and definitions: :mod:`qsparse_export.ops.topk_sparsify` and :mod:`qsparse_export.ops.ternary_matmul`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from qsparse_export.runtimes.tvm.kernels.emit import INFINITY_BITS, add_to, const, fill, ramp, total, vector

UNROLL = 4
"""Vectors that a loop over a row takes at a time."""
TILE_CHANNELS = 64
"""Channels that a dense product unpacks at a time: rows are padded to whole tiles."""
NORM_FLOOR = 1e-12
GAMMA_FLOOR = 1e-5


@dataclass(frozen=True)
class Selection:
    """Which of ``width`` channels stay: ``k`` of each ``block`` (0: of the row), then divided by the norm (``rescale`` l2)."""

    width: int
    k: int
    block: int
    rescale: str

    @property
    def unit(self) -> int:
        """Channels that compete."""
        return min(self.block, self.width) if self.block else self.width

    @property
    def selects(self) -> bool:
        """Whether any channel is ever dropped."""
        return self.k < self.unit

    def padded(self, lanes: int) -> int:
        """Channels with padding: whole units, tiles, and steps of a loop with vectors of ``lanes``."""
        step = max(lanes * UNROLL, TILE_CHANNELS)
        units = -(-self.width // self.unit) * self.unit if self.unit else 0
        return -(-max(units, 1) // step) * step


def load_row(x: Any, row: Any, width: int, lanes: int, out: Any, padded: int) -> None:
    """Copies x[row, :width] to ``out``, zeros up to ``padded``."""
    whole = width // lanes * lanes
    with T.serial(0, whole // lanes) as i:
        T.buffer_store(out, x.vload([row, i * lanes], f"float32x{lanes}"), [ramp(i * lanes, lanes)])
    with T.serial(whole, width) as i:
        T.buffer_store(out, x[row, i], [i])
    with T.serial(width, padded) as i:
        T.buffer_store(out, const(0.0, "float32"), [i])


def mask(selection: Selection, lanes: int, values: Any, largest: Any) -> None:
    """Zeroes what ``selection`` drops in ``values`` (float32, padded with zeros), but for NaN, and rescales the rest.

    ``largest[0]`` becomes the largest bit pattern without sign of the result: from INFINITY_BITS on, it holds Inf or NaN.
    """
    padded = selection.padded(lanes)
    if selection.selects:
        magnitude = T.alloc_buffer((padded,), "int32")
        _magnitudes(selection, lanes, values, magnitude)
        if selection.k:
            with T.serial(0, -(-selection.width // selection.unit)) as unit:
                _drop(selection, lanes, magnitude, unit * selection.unit)
        with T.serial(0, padded // lanes) as i:
            at = ramp(i * lanes, lanes)
            nan = _magnitude_bits(values[at], lanes) > vector(INFINITY_BITS, "int32", lanes)
            kept = T.Or(magnitude[at] >= vector(0, "int32", lanes), nan)
            T.buffer_store(values, T.Select(kept, values[at], vector(0.0, "float32", lanes)), [at])
    if selection.rescale == "l2":
        _rescale(selection, lanes, values)
    peak = T.alloc_buffer((lanes,), "int32", scope="local")
    fill(peak, 0, lanes, "int32", lanes)
    with T.serial(0, padded // lanes) as i:
        bits = _magnitude_bits(values[ramp(i * lanes, lanes)], lanes)
        T.buffer_store(peak, T.max(peak[ramp(0, lanes)], bits), [ramp(0, lanes)])
    result = peak[0]
    for lane in range(1, lanes):
        result = T.max(result, peak[lane])
    T.buffer_store(largest, result, [0])


def finite(value: Any, lanes: int) -> Any:
    """A vector with 0 in the place of NaN and Inf."""
    bits = _magnitude_bits(value, lanes)
    return T.Select(bits < vector(INFINITY_BITS, "int32", lanes), value, vector(0.0, "float32", lanes))


def _magnitude_bits(value: Any, lanes: int) -> Any:
    return T.bitwise_and(T.reinterpret(f"int32x{lanes}", value), vector(0x7FFFFFFF, "int32", lanes))


def _magnitudes(selection: Selection, lanes: int, values: Any, magnitude: Any) -> None:
    """Bit patterns that are in the order of the magnitudes, NaN as infinity; -1 where nothing stays, and for the padding."""
    with T.serial(0, selection.padded(lanes) // lanes) as i:
        at = ramp(i * lanes, lanes)
        bits = _magnitude_bits(values[at], lanes) if selection.k else vector(-1, "int32", lanes)
        T.buffer_store(magnitude, T.min(bits, vector(INFINITY_BITS, "int32", lanes)), [at])
    with T.serial(selection.width, selection.padded(lanes)) as i:
        T.buffer_store(magnitude, const(-1, "int32"), [i])


def _drop(selection: Selection, lanes: int, magnitude: Any, start: Any) -> None:
    """Makes the magnitudes of the unit at ``start`` -1 but for the ``k`` largest, of equal ones the first.

    Bisection for the largest threshold that at least k magnitudes reach: bit patterns of non-negative floats are in the
    order of the floats.
    """
    state = T.alloc_buffer((4,), "int32", scope="local")  # low, high, how many reach low, position
    low, high, reach, position = range(4)
    counts = T.alloc_buffer((lanes,), "int32", scope="local")
    real = T.bind(T.min(const(selection.unit, "int32"), selection.width - start))
    wanted = T.bind(T.min(const(selection.k, "int32"), real))
    T.buffer_store(state, const(0, "int32"), [low])
    T.buffer_store(state, const(INFINITY_BITS + 1, "int32"), [high])
    T.buffer_store(state, real, [reach])
    with T.While(T.And(state[high] - state[low] > 1, state[reach] != wanted)):
        middle = T.bind(state[low] + T.shift_right(state[high] - state[low], const(1, "int32")))
        _count(selection, lanes, magnitude, start, middle, counts)
        found = T.bind(total(counts, lanes))
        with T.If(found >= wanted):
            with T.Then():
                T.buffer_store(state, middle, [low])
                T.buffer_store(state, found, [reach])
            with T.Else():
                T.buffer_store(state, middle, [high])
    threshold = T.bind(state[low])
    T.buffer_store(state, start + real, [position])
    with T.While(state[reach] > wanted):  # more reach it than may stay: the last of those that equal it go
        T.buffer_store(state, state[position] - 1, [position])
        with T.If(magnitude[state[position]] == threshold), T.Then():
            T.buffer_store(magnitude, const(-1, "int32"), [state[position]])
            T.buffer_store(state, state[reach] - 1, [reach])
    step = lanes if selection.unit % lanes == 0 else 1
    extent = selection.padded(lanes) if not selection.block else selection.unit
    with T.serial(0, extent // step) as i:
        at = ramp(start + i * step, step) if step > 1 else start + i
        bound, none = (vector(v, "int32", step) if step > 1 else v for v in (threshold, const(-1, "int32")))
        T.buffer_store(magnitude, T.Select(magnitude[at] >= bound, magnitude[at], none), [at])


def _count(selection: Selection, lanes: int, magnitude: Any, start: Any, middle: Any, counts: Any) -> None:
    """``counts`` (``lanes`` of them) add up to the magnitudes of the unit that are at least ``middle``."""
    fill(counts, 0, lanes, "int32", lanes)
    extent = selection.unit if selection.block else selection.padded(lanes)
    if extent % lanes:
        with T.serial(0, extent) as i:
            add_to(counts, 0, T.Cast("int32", magnitude[start + i] >= middle))
        return
    unroll = UNROLL if extent % (lanes * UNROLL) == 0 else 1
    with T.serial(0, extent // (lanes * unroll)) as i:
        found = None
        for j in range(unroll):
            at = ramp(start + (i * unroll + j) * lanes, lanes)
            reached = T.Cast(f"int32x{lanes}", magnitude[at] >= vector(middle, "int32", lanes))
            found = reached if found is None else found + reached
        add_to(counts, 0, found)


def _rescale(selection: Selection, lanes: int, values: Any) -> None:
    """Divides the row by its norm, floored; a NaN stays one."""
    squares = T.alloc_buffer((lanes,), "float32", scope="local")
    fill(squares, 0, lanes, "float32", lanes)
    with T.serial(0, selection.padded(lanes) // lanes) as i:
        part = T.bind(values[ramp(i * lanes, lanes)])
        add_to(squares, 0, part * part)
    norm = T.bind(T.sqrt(total(squares, lanes)))
    floor = const(NORM_FLOOR, "float32")
    divisor = T.bind(T.Select(norm < floor, floor, norm))
    with T.serial(0, selection.padded(lanes) // lanes) as i:
        at = ramp(i * lanes, lanes)
        T.buffer_store(values, values[at] / vector(divisor, "float32", lanes), [at])


def quantize(padded: int, lanes: int, values: Any, largest: Any, q: Any, facts: Any) -> None:
    """``q`` = the int8 activations of the row ``values``; ``facts`` = (gamma / 127, sum of q as a float32's bits).

    gamma / 127 is NaN where ``largest`` says that the row holds NaN or Inf.
    """
    sums = T.alloc_buffer((lanes,), "int32", scope="local")
    fill(sums, 0, lanes, "int32", lanes)
    gamma = T.bind(T.max(T.reinterpret("float32", T.min(largest[0], INFINITY_BITS)), const(GAMMA_FLOOR, "float32")))
    inverse = T.bind(const(127.0, "float32") / gamma)
    with T.serial(0, padded // lanes) as i:
        at = ramp(i * lanes, lanes)
        scaled = T.nearbyint(vector(inverse, "float32", lanes) * finite(values[at], lanes))
        clipped = T.max(T.min(scaled, vector(127.0, "float32", lanes)), vector(-128.0, "float32", lanes))
        integer = T.bind(T.Cast(f"int32x{lanes}", clipped))
        add_to(sums, 0, integer)
        T.buffer_store(q, T.Cast(f"int8x{lanes}", integer), [at])
    good = largest[0] < INFINITY_BITS
    factor = T.Select(good, gamma / const(127.0, "float32"), const(float("nan"), "float32"))
    T.buffer_store(facts, factor, [0])
    T.buffer_store(facts, T.reinterpret("float32", total(sums, lanes)), [1])
