"""Vector expressions that several kernels use: loads, sums over lanes, the exponential function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from qsparse_export.runtimes.tvm.kernels.emit import shuffled

LOWEST = -104.0  # its exponential is less than half the smallest float32: 0
_LOG2_E = 1.44269504088896341
# ln 2 in two parts: the first has so few digits that its product with an exponent is exact (Cody and Waite).
_LN2_HIGH = 0.693359375
_LN2_LOW = -2.12194440e-4
# exp(r) = 1 + r + r^2 p(r) for |r| <= ln 2 / 2, p of degree 5 (Moshier, Cephes expf): an error of about one unit in the
# last place.
_POLYNOMIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)


def splat(value: float, lanes: int) -> Any:
    """A float32 constant in all lanes."""
    constant = tirx.const(value, "float32")
    return constant if lanes == 1 else T.Broadcast(constant, lanes)


def load(buffer: Any, row: Sequence[Any], column: Any, lanes: int) -> Any:
    """``lanes`` neighbouring values of ``buffer`` from ``column`` on."""
    if lanes == 1:
        return buffer[(*row, column)]
    return buffer.vload([*row, column], f"{buffer.dtype}x{lanes}")


def store(buffer: Any, value: Any, row: Sequence[Any], column: Any, lanes: int) -> None:
    """Writes what :func:`load` reads."""
    T.buffer_store(buffer, value, [*row, column if lanes == 1 else T.Ramp(column, 1, lanes)])


def sum_of_lanes(vector: Any, lanes: int) -> Any:
    """Sum of all lanes (a power of two), the halves first: log2(lanes) additions."""
    return _by_halves(vector, lanes, lambda low, high: low + high)


def largest_lane(vector: Any, lanes: int) -> Any:
    """The largest of all lanes (a power of two)."""
    return _by_halves(vector, lanes, T.max)


def _by_halves(vector: Any, lanes: int, combine: Callable[[Any, Any], Any]) -> Any:
    while lanes > 1:
        lanes //= 2
        vector = T.bind(vector)
        vector = combine(*(shuffled([vector], list(range(start, start + lanes))) for start in (0, lanes)))
    return vector


def sums_of_lanes(vectors: list[Any]) -> Any:
    """The sums of 4 vectors of 4 lanes, or 8 of 8, as the lanes of one.

    Neighbours of two vectors add up within quarters of a register, which one instruction shuffles: [a0+a1, a2+a3, b0+b1,
    b2+b3] and so on; then all four of a quarter's vectors; at last, of 8 lanes, the halves.
    """
    lanes = len(vectors)
    vectors = [T.bind(vector) for vector in vectors]
    for _ in range(2):
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [_neighbours_added(a, b, lanes) for a, b in pairs]
    if lanes == 4:
        return vectors[0]
    low = shuffled(vectors, [0, 1, 2, 3, 8, 9, 10, 11])
    return low + shuffled(vectors, [4, 5, 6, 7, 12, 13, 14, 15])


def _neighbours_added(a: Any, b: Any, lanes: int) -> Any:
    even = [source + 4 * quarter + lane for quarter in range(lanes // 4) for source in (0, lanes) for lane in (0, 2)]
    return T.bind(shuffled([a, b], even) + shuffled([a, b], [lane + 1 for lane in even]))


def exponential(x: Any, lanes: int) -> Any:
    """exp(x) of float32 lanes, subnormal numbers included; 0 from :data:`LOWEST` down, infinity above 88.7, NaN of NaN."""
    floor = splat(LOWEST, lanes)
    ceiling = splat(89.0, lanes)
    x = T.bind(x)
    # A NaN compares as false and stays.
    clamped = T.bind(T.Select(x < floor, floor, T.Select(x > ceiling, ceiling, x)))
    exponent = T.bind(T.floor(clamped * splat(_LOG2_E, lanes) + splat(0.5, lanes)))
    r = T.bind(clamped - exponent * splat(_LN2_HIGH, lanes) - exponent * splat(_LN2_LOW, lanes))
    polynomial = splat(_POLYNOMIAL[0], lanes)
    for coefficient in _POLYNOMIAL[1:]:
        polynomial = polynomial * r + splat(coefficient, lanes)
    integer = T.bind(T.cast(exponent, _typed("int32", lanes)))  # of a NaN: any number, and the product stays NaN
    # 2^exponent in two factors: 2^128 and 2^-150 have no float32.
    half = T.bind(T.shift_right(integer, splat_int(1, lanes)))
    result = T.bind(polynomial * r * r + r + splat(1.0, lanes))
    return T.bind(result * _power_of_two(half, lanes) * _power_of_two(integer - half, lanes))


def _power_of_two(exponent: Any, lanes: int) -> Any:
    return T.reinterpret(_typed("float32", lanes), T.shift_left(exponent + splat_int(127, lanes), splat_int(23, lanes)))


def splat_int(value: int, lanes: int) -> Any:
    """An int32 constant in all lanes."""
    constant = tirx.const(value, "int32")
    return constant if lanes == 1 else T.Broadcast(constant, lanes)


def _typed(dtype: str, lanes: int) -> str:
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def in_vectors(size: int, lanes: int, body: Callable[[Any, int], None]) -> None:
    """``body(column, lanes)`` over 0..size-1 in vectors, the rest one by one (``lanes`` 1)."""
    whole = size // lanes
    if whole:
        with T.serial(0, whole) as i:
            body(i * lanes, lanes)
    if size % lanes:
        with T.serial(whole * lanes, size) as i:
            body(i, 1)


def for_rows(rows: Any, body: Callable[[Any], None]) -> None:
    """``body(row)`` for 0..rows-1: several on all threads, one on the caller's, since waking threads takes longer than a row."""
    with T.If(rows == 1):
        with T.Then(), T.serial(0, 1) as row:
            body(row)
        with T.Else(), T.parallel(0, rows) as row:
            body(row)
