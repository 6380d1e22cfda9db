"""RMSNormalization and AddRmsNorm over rows (:mod:`qsparse_export.ops.add_rms_norm` has the formula)."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from qsparse_export.runtimes.tvm.kernels.emit import for_rows, in_vectors, load, store, sum_of_lanes, vector
from qsparse_export.runtimes.tvm.lanes import Lanes


def rms_norm(lanes: Lanes, *, n: int, epsilon: float) -> tirx.PrimFunc:
    """x float32 [M, n], weight float32 [n] to y float32 [M, n]."""
    m = tirx.Var("m", "int64")
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("rms_norm")
        T.func_attr({"tirx.noalias": True})
        x = T.arg("x", T.buffer((m, n), "float32"))
        weight = T.arg("weight", T.buffer((n,), "float32"))
        y = T.arg("y", T.buffer((m, n), "float32"))
        for_rows(m, lambda row: _normalise(lanes, x, weight, y, row, n, epsilon))
    return builder.get()


def add_rms_norm(lanes: Lanes, *, n: int, epsilon: float) -> tirx.PrimFunc:
    """x and residual float32 [M, n], weight float32 [n] to their sum and y, both float32 [M, n]."""
    m = tirx.Var("m", "int64")
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("add_rms_norm")
        T.func_attr({"tirx.noalias": True})
        x = T.arg("x", T.buffer((m, n), "float32"))
        residual = T.arg("residual", T.buffer((m, n), "float32"))
        weight = T.arg("weight", T.buffer((n,), "float32"))
        total = T.arg("total", T.buffer((m, n), "float32"))
        y = T.arg("y", T.buffer((m, n), "float32"))

        def row_of(row: Any) -> None:
            def add(column: Any, width: int) -> None:
                value = load(x, [row], column, width) + load(residual, [row], column, width)
                store(total, value, [row], column, width)

            in_vectors(n, lanes.floats, add)
            _normalise(lanes, total, weight, y, row, n, epsilon)

        for_rows(m, row_of)
    return builder.get()


def _normalise(lanes: Lanes, x: Any, weight: Any, y: Any, row: Any, n: int, epsilon: float) -> None:
    """``y = x / sqrt(mean(x^2) + epsilon) * weight`` of one row, the squares summed in lanes."""
    width = lanes.floats
    partial = T.alloc_buffer((width,), "float32", scope="local")
    single = T.alloc_buffer((1,), "float32", scope="local")
    store(partial, vector(0.0, "float32", width), [], 0, width)
    store(single, vector(0.0, "float32", 1), [], 0, 1)

    def add_square(column: Any, lanes_here: int) -> None:
        value = T.bind(load(x, [row], column, lanes_here))
        target = single if lanes_here == 1 else partial
        store(target, load(target, [], 0, lanes_here) + value * value, [], 0, lanes_here)

    in_vectors(n, width, add_square)
    squares = single[0] + sum_of_lanes(load(partial, [], 0, width), width)
    mean = squares / tirx.const(float(max(n, 1)), "float32")
    factor = T.bind(tirx.const(1.0, "float32") / T.sqrt(mean + tirx.const(epsilon, "float32")))

    def scale(column: Any, lanes_here: int) -> None:
        spread = factor if lanes_here == 1 else T.Broadcast(factor, lanes_here)
        value = load(x, [row], column, lanes_here) * spread * load(weight, [], column, lanes_here)
        store(y, value, [row], column, lanes_here)

    in_vectors(n, width, scale)
