"""Short names for the TIR that the kernels are made of."""

from __future__ import annotations

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
    return T.Broadcast(scalar, lanes)


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
