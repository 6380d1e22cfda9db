"""Short names for the TIR that the kernels are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

INFINITY_BITS = 0x7F800000
"""The bit pattern of float32 infinity; what is above it, without the sign, is NaN."""


LINE_BYTES = 64
"""Of a cache."""


def const(value: float, dtype: str) -> Any:
    """A scalar constant."""
    return tirx.const(value, dtype)


def vector(value: Any, dtype: str, lanes: int) -> Any:
    """``lanes`` copies of a scalar of ``dtype``, a Python number or an expression."""
    scalar = const(value, dtype) if isinstance(value, int | float) else value
    return scalar if lanes == 1 else T.Broadcast(scalar, lanes)


def ramp(start: Any, lanes: int) -> Any:
    """``lanes`` consecutive indices from ``start``."""
    return T.Ramp(start, 1, lanes)


def shuffled(vectors: list[Any], lanes: list[int]) -> Any:
    """Lanes of the joined ``vectors``, in the order of their numbers."""
    return tirx.Shuffle(vectors, [tirx.const(lane, "int32") for lane in lanes])


def add_to(buffer: Any, index: Any, value: Any) -> None:
    """``buffer[index] += value`` for a scalar or a ramp of indices."""
    lanes = value.ty.dtype.lanes
    at = index if lanes == 1 else ramp(index, lanes)
    T.buffer_store(buffer, buffer[at] + value, [at])


def fill(buffer: Any, start: Any, count: int, dtype: str, lanes: int, value: float = 0) -> None:
    """Stores ``value`` into ``count`` elements from ``start``; ``lanes`` divides ``count``."""
    with T.serial(0, count // lanes) as i:
        T.buffer_store(buffer, vector(value, dtype, lanes), [ramp(start + i * lanes, lanes)])


def total(vector_buffer: Any, lanes: int) -> Any:
    """The sum of the first ``lanes`` elements of a buffer."""
    result = vector_buffer[0]
    for lane in range(1, lanes):
        result = result + vector_buffer[lane]
    return result


def prefetch(buffer: Any, indices: list[Any], locality: int) -> None:
    """Asks for the cache line of an element; ``locality`` 3 is the first-level cache, 2 the second."""
    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch.p0", T.address_of(buffer[tuple(indices)]), 0, locality, 1))


def fill_rows(y: Any, rows: Any, columns: int) -> None:
    """Stores zeros into ``rows`` rows: what a product without inputs gives."""
    with T.serial(0, rows) as row, T.serial(0, columns) as i:
        T.buffer_store(y, const(0.0, "float32"), [row, i])


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
