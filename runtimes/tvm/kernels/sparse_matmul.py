"""SparseMatMul over rows (:mod:`qsparse_export.ops.sparse_matmul` has the definition), and with ``k`` = K a plain MatMul.

Row by row: the mask, the list of the channels that are left, and then those rows of the weights, added up by tiles of
outputs on all threads. A weight row is read in long pieces, as it lies in memory.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from qsparse_export.runtimes.tvm.kernels.active_channels import Selection, load_row, mask
from qsparse_export.runtimes.tvm.kernels.emit import in_vectors, load, store, vector
from qsparse_export.runtimes.tvm.lanes import Lanes

TILE = 256
"""Outputs of a task: their sums stay in the first-level cache."""

_CHANNELS = 4  # rows of weights per pass over the sums


def sparse_matmul(lanes: Lanes, *, k_in: int, n: tuple[int, ...], k: int, block: int, rescale: str) -> tirx.PrimFunc:
    """x float32 [M, k_in], w float32 [k_in, sum(n)] to y float32 [M, sum(n)]."""
    m = tirx.Var("m", "int64")
    outputs = sum(n)
    selection = Selection(k_in, k, block, rescale)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("sparse_matmul")
        T.func_attr({"tirx.noalias": True})
        x = T.arg("x", T.buffer((m, k_in), "float32"))
        w = T.arg("w", T.buffer((k_in, outputs), "float32"))
        y = T.arg("y", T.buffer((m, outputs), "float32"))
        with T.serial(0, m) as row:
            padded = selection.padded(lanes.floats)
            masked = T.alloc_buffer((padded,), "float32")
            largest = T.alloc_buffer((1,), "int32", scope="local")
            channels = T.alloc_buffer((k_in + _CHANNELS,), "int32")
            active = T.alloc_buffer((1,), "int32")
            load_row(x, row, k_in, lanes.floats, masked, padded)
            mask(selection, lanes.floats, masked, largest)
            _list_active(masked, channels, active, k_in)
            with T.parallel(0, -(-outputs // TILE)) as tile:
                _product(lanes, masked, channels, active, w, y, row, tile, outputs)
    return builder.get()


def _list_active(masked: Any, channels: Any, active: Any, k_in: int) -> None:
    """Numbers of the channels that are not 0, a NaN among them."""
    store(active, vector(0, "int32", 1), [], 0, 1)
    with T.serial(0, k_in) as c:
        T.buffer_store(channels, T.cast(c, "int32"), [active[0]])
        # By its bits: TVM's != of floats is false for NaN.
        magnitude = T.bitwise_and(T.reinterpret("int32", masked[c]), vector(0x7FFFFFFF, "int32", 1))
        store(active, active[0] + T.Select(magnitude != 0, vector(1, "int32", 1), vector(0, "int32", 1)), [], 0, 1)


def _product(
    lanes: Lanes, masked: Any, channels: Any, active: Any, w: Any, y: Any, row: Any, tile: Any, outputs: int
) -> None:
    begin = T.bind(tile * TILE)

    def of_width(width: int) -> None:
        sums = T.alloc_buffer((width,), "float32", scope="local")
        in_vectors(width, lanes.floats, lambda c, here: store(sums, vector(0.0, "float32", here), [], c, here))

        def add(first: Any, count: int) -> None:
            rows = [T.bind(channels[first + i]) for i in range(count)]
            values = [T.bind(masked[channel]) for channel in rows]

            def add_columns(column: Any, here: int) -> None:
                total = load(sums, [], column, here)
                for channel, value in zip(rows, values, strict=True):
                    spread = value if here == 1 else T.Broadcast(value, here)
                    total = total + spread * load(w, [channel], begin + column, here)
                store(sums, total, [], column, here)

            in_vectors(width, lanes.floats, add_columns)

        quads = T.bind(T.floordiv(active[0], _CHANNELS))
        with T.serial(0, quads) as i:
            add(i * _CHANNELS, _CHANNELS)
        with T.serial(quads * _CHANNELS, active[0]) as i:
            add(i, 1)
        in_vectors(width, lanes.floats, lambda c, here: store(y, load(sums, [], c, here), [row], begin + c, here))

    if outputs % TILE == 0:
        of_width(TILE)
    elif outputs < TILE:
        of_width(outputs)
    else:
        with T.If(tile < outputs // TILE):
            with T.Then():
                of_width(TILE)
            with T.Else():
                of_width(outputs % TILE)
