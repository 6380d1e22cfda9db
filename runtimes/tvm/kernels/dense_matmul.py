"""A float32 product with a matrix that is stored output by output: ``y = x w^T``, the head of a model tied to its embedding."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from qsparse_export.runtimes.tvm.kernels.emit import in_vectors, load, store, sum_of_lanes, vector
from qsparse_export.runtimes.tvm.lanes import Lanes

OUTPUTS_AT_ONCE = 4
"""Outputs whose sums stay in registers while a row of x is read once."""


def dense_matmul(lanes: Lanes, *, k_in: int, n: int) -> tirx.PrimFunc:
    """x float32 [M, k_in], w float32 [n, k_in] to y float32 [M, n]. Sums are float32, in lanes."""
    m = tirx.Var("m", "int64")
    whole = n // OUTPUTS_AT_ONCE
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("dense_matmul")
        T.func_attr({"tirx.noalias": True})
        x = T.arg("x", T.buffer((m, k_in), "float32"))
        w = T.arg("w", T.buffer((n, k_in), "float32"))
        y = T.arg("y", T.buffer((m, n), "float32"))
        if whole:
            with T.parallel(0, whole) as i, T.serial(0, m) as row:
                _outputs(lanes, x, w, y, row, i * OUTPUTS_AT_ONCE, OUTPUTS_AT_ONCE, k_in)
        if n % OUTPUTS_AT_ONCE:
            with T.serial(0, m) as row:
                _outputs(lanes, x, w, y, row, whole * OUTPUTS_AT_ONCE, n % OUTPUTS_AT_ONCE, k_in)
    return builder.get()


def _outputs(lanes: Lanes, x: Any, w: Any, y: Any, row: Any, first: Any, count: int, k_in: int) -> None:
    width = lanes.floats
    sums = T.alloc_buffer((count * width,), "float32", scope="local")
    rest = T.alloc_buffer((count,), "float32", scope="local")
    for i in range(count):
        store(sums, vector(0.0, "float32", width), [], i * width, width)
        store(rest, vector(0.0, "float32", 1), [], i, 1)

    def add(column: Any, here: int) -> None:
        value = T.bind(load(x, [row], column, here))
        for i in range(count):
            target, at = (rest, i) if here == 1 else (sums, i * width)
            product = value * load(w, [first + i], column, here)
            store(target, load(target, [], at, here) + product, [], at, here)

    in_vectors(k_in, width, add)
    for i in range(count):
        total = sum_of_lanes(load(sums, [], i * width, width), width) + rest[i]
        T.buffer_store(y, total, [row, first + i])
