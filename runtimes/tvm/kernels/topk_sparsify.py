"""TopKSparsify over rows (:mod:`qsparse_export.ops.topk_sparsify` has the definition).

The k-th largest magnitude is found bit by bit: as an integer the bits of a positive float32 keep its order, so the largest
number that k magnitudes reach is built from its highest bit down, with one count over the row per bit. What is NaN is also
told by its bits: TVM's ``!=`` of floats is false for NaN.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from qsparse_export.ops.topk_sparsify import NORM_FLOOR
from qsparse_export.runtimes.tvm.kernels.vectors import (
    for_rows,
    in_vectors,
    load,
    splat,
    splat_int,
    store,
    sum_of_lanes,
)
from qsparse_export.runtimes.tvm.lanes import Lanes

_INFINITY_BITS = 0x7F800000


def topk_sparsify(lanes: Lanes, *, k_in: int, k: int, block: int, rescale: str) -> tirx.PrimFunc:
    """x float32 [M, k_in] to the masked y float32 [M, k_in]."""
    m = tirx.Var("m", "int64")
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("topk_sparsify")
        T.func_attr({"tirx.noalias": True})
        x = T.arg("x", T.buffer((m, k_in), "float32"))
        y = T.arg("y", T.buffer((m, k_in), "float32"))
        for_rows(m, lambda row: mask_row(lanes, x, row, y, [row], k_in, k, block, rescale))
    return builder.get()


def mask_row(
    lanes: Lanes, x: Any, row: Any, y: Any, at: list[Any], k_in: int, k: int, block: int, rescale: str
) -> None:
    """Writes row ``row`` of x [M, k_in], masked, to ``y[at]`` of the same length."""
    magnitude = T.alloc_buffer((max(k_in, 1),), "int32")

    def measure(column: Any, width: int) -> None:
        bits = T.bitwise_and(_bits(load(x, [row], column, width), width), splat_int(0x7FFFFFFF, width))
        store(magnitude, T.min(bits, splat_int(_INFINITY_BITS, width)), [], column, width)  # a NaN ranks as infinity

    in_vectors(k_in, lanes.floats, measure)
    width = block or k_in
    whole = k_in // width if width else 0
    if whole:
        with T.serial(0, whole) as i:
            _select(lanes, x, row, y, at, magnitude, i * width, width, k)
    if width and k_in % width:
        _select(lanes, x, row, y, at, magnitude, whole * width, k_in % width, min(k, k_in % width))
    if rescale == "l2":
        _rescale(lanes, y, at, k_in)


def _select(
    lanes: Lanes, x: Any, row: Any, y: Any, at: list[Any], magnitude: Any, begin: Any, width: int, k: int
) -> None:
    """Keeps the k largest of ``width`` channels from ``begin`` on, the lowest channel of equal ones, and every NaN."""

    def count(of: Any, above: bool) -> Any:
        """How many magnitudes reach ``of``, or exceed it."""
        vector = T.alloc_buffer((lanes.floats,), "int32", scope="local")
        single = T.alloc_buffer((1,), "int32", scope="local")
        store(vector, splat_int(0, lanes.floats), [], 0, lanes.floats)
        store(single, splat_int(0, 1), [], 0, 1)

        def add(column: Any, here: int) -> None:
            value = load(magnitude, [], begin + column, here)
            limit = of if here == 1 else T.Broadcast(of, here)
            one = T.Select(value > limit if above else value >= limit, splat_int(1, here), splat_int(0, here))
            target = single if here == 1 else vector
            store(target, load(target, [], 0, here) + one, [], 0, here)

        in_vectors(width, lanes.floats, add)
        return T.bind(single[0] + sum_of_lanes(load(vector, [], 0, lanes.floats), lanes.floats))

    if k == width:
        in_vectors(width, lanes.floats, lambda c, here: store(y, load(x, [row], begin + c, here), at, begin + c, here))
        return
    kth = T.alloc_buffer((1,), "int32", scope="local")
    room = T.alloc_buffer((1,), "int32", scope="local")
    if k:
        store(kth, splat_int(0, 1), [], 0, 1)
        with T.serial(0, 31) as bit:
            candidate = T.bind(
                T.bitwise_or(kth[0], T.shift_left(splat_int(1, 1), splat_int(30, 1) - T.cast(bit, "int32")))
            )
            with T.If(count(candidate, above=False) >= splat_int(k, 1)), T.Then():
                store(kth, candidate, [], 0, 1)
        store(room, splat_int(k, 1) - count(kth[0], above=True), [], 0, 1)
    else:
        store(kth, splat_int(0x7FFFFFFF, 1), [], 0, 1)  # more than any magnitude
        store(room, splat_int(0, 1), [], 0, 1)
    with T.serial(0, width) as c:
        value = T.bind(load(x, [row], begin + c, 1))
        tied = T.bind(T.Select(magnitude[begin + c] == kth[0], splat_int(1, 1), splat_int(0, 1)))
        kept = T.bind(T.Or(magnitude[begin + c] > kth[0], T.And(tied == 1, room[0] > 0)))
        store(room, room[0] - tied, [], 0, 1)
        nan = T.bitwise_and(_bits(value, 1), splat_int(0x7FFFFFFF, 1)) > splat_int(_INFINITY_BITS, 1)
        store(y, T.Select(T.Or(kept, nan), value, splat(0.0, 1)), at, begin + c, 1)


def _rescale(lanes: Lanes, y: Any, at: list[Any], k_in: int) -> None:
    """Divides a row by its L2 norm, floored."""
    vector = T.alloc_buffer((lanes.floats,), "float32", scope="local")
    single = T.alloc_buffer((1,), "float32", scope="local")
    store(vector, splat(0.0, lanes.floats), [], 0, lanes.floats)
    store(single, splat(0.0, 1), [], 0, 1)

    def add(column: Any, here: int) -> None:
        value = T.bind(load(y, at, column, here))
        target = single if here == 1 else vector
        store(target, load(target, [], 0, here) + value * value, [], 0, here)

    in_vectors(k_in, lanes.floats, add)
    norm = T.bind(T.sqrt(single[0] + sum_of_lanes(load(vector, [], 0, lanes.floats), lanes.floats)))
    floor = splat(NORM_FLOOR, 1)
    floored = T.bind(T.Select(norm < floor, floor, norm))  # a NaN stays

    def divide(column: Any, here: int) -> None:
        spread = floored if here == 1 else T.Broadcast(floored, here)
        store(y, load(y, at, column, here) / spread, at, column, here)

    in_vectors(k_in, lanes.floats, divide)


def _bits(value: Any, lanes: int) -> Any:
    return T.reinterpret("int32" if lanes == 1 else f"int32x{lanes}", value)
