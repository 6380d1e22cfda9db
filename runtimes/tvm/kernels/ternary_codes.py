"""Products of packed ternary codes with int8 activations, in vectors: interleaving, masking, adding up.

A vector of V bytes of a weight row holds 4 V outputs, byte j the outputs 4 j + p in its planes p (``formats.ternary``).
To multiply ``channels`` rows at once, their bytes are interleaved within segments of 16 bytes, so that a lane of the
product belongs to one byte j. Order of sums of a block of V bytes: [h][p][segment][i] for j = 16 segment + 16 / channels
* h + i: the order in which unpacking instructions leave them.
"""

from __future__ import annotations

from typing import Any

from tvm.tirx.script.builder import ir as T

from qsparse_export.runtimes.tvm.kernels.emit import ramp, shuffled, vector
from qsparse_export.runtimes.tvm.lanes import Lanes

PLANES = 4
SEGMENT_BYTES = 16


def sum_lanes(lanes: Lanes) -> int:
    """Sums in the vector of one plane."""
    return lanes.vector_bytes // lanes.ternary.channels


def interleaved(lanes: Lanes, rows: list[Any]) -> list[Any]:
    """The vectors h of the ``channels`` rows' bytes, neighbours being the same byte of successive rows."""
    if len(rows) == 1:
        return rows
    pairs = [_unpack(lanes, rows[i], rows[i + 1], 1) for i in range(0, len(rows), 2)]
    if len(pairs) == 1:
        return pairs[0]
    return [half for first, second in zip(*pairs, strict=True) for half in _unpack(lanes, first, second, 2)]


def _unpack(lanes: Lanes, a: Any, b: Any, unit: int) -> list[Any]:
    """The lower and upper halves of the segments of a and b, units of ``unit`` bytes in turn."""
    size = lanes.vector_bytes
    halves = []
    for half in range(2):
        order = []
        for segment in range(0, size, SEGMENT_BYTES):
            begin = segment + half * SEGMENT_BYTES // 2
            for start in range(begin, begin + SEGMENT_BYTES // 2, unit):
                order += [*range(start, start + unit), *range(size + start, size + start + unit)]
        halves.append(T.bind(shuffled([a, b], order)))
    return halves


def plane(lanes: Lanes, codes: Any, p: int) -> Any:
    """The codes 0..2 of plane ``p``, uint8 lanes."""
    size = lanes.vector_bytes
    wide = T.reinterpret(f"uint16x{size // 2}", codes)
    shifted = T.shift_right(wide, vector(2 * p, "uint16", size // 2)) if p else wide
    masked = T.bitwise_and(shifted, vector(0x0303, "uint16", size // 2))
    return T.reinterpret(f"uint8x{size}", masked)


def activations(lanes: Lanes, q: Any, at: Any) -> Any:
    """``channels`` consecutive activations from q[at] in every lane of a product."""
    return spread(lanes, q[at] if lanes.ternary.channels == 1 else q[ramp(at, lanes.ternary.channels)])


def spread(lanes: Lanes, values: Any) -> Any:
    """A vector of ``channels`` int8 activations (a scalar of one) in every lane of a product."""
    channels, size = lanes.ternary.channels, lanes.vector_bytes
    if channels == 1:
        return T.Broadcast(values, size)
    word = T.reinterpret(f"int{8 * channels}", values)
    return T.reinterpret(f"int8x{size}", T.Broadcast(word, size // channels))


def multiply_add(lanes: Lanes, sums: Any, codes: Any, values: Any) -> Any:
    """sums + codes * values, added up over the channels of a lane."""
    dot, size = lanes.ternary, lanes.vector_bytes
    count = sum_lanes(lanes)
    kind = f"{dot.sum_dtype}x{count}"
    if not dot.intrinsic:
        return sums + T.Cast(kind, codes) * T.Cast(kind, values)
    given = codes if dot.codes_dtype == "uint8" else T.reinterpret(f"{dot.codes_dtype}x{size}", codes)
    if dot.accumulates:
        return T.call_llvm_pure_intrin(kind, dot.intrinsic, sums, given, values)
    return sums + T.call_llvm_pure_intrin(kind, dot.intrinsic, given, values)


def zeros(lanes: Lanes) -> Any:
    """No sum yet, of one plane."""
    return vector(0, lanes.ternary.sum_dtype, sum_lanes(lanes))


def natural_order(lanes: Lanes, load: Any) -> list[tuple[int, Any]]:
    """Vectors of a block's values in the order of the outputs, each with the output that it begins at.

    ``load(offset, count)`` gives ``count`` values from ``offset`` in the order of sums.
    """
    part = SEGMENT_BYTES // lanes.ternary.channels
    count = sum_lanes(lanes)
    order = [p * part + i for i in range(part) for p in range(PLANES)]
    result = []
    for h in range(lanes.ternary.channels):
        for segment in range(lanes.vector_bytes // SEGMENT_BYTES):
            planes = [load((h * PLANES + p) * count + segment * part, part) for p in range(PLANES)]
            result.append((PLANES * (SEGMENT_BYTES * segment + part * h), shuffled(planes, order)))
    return result
