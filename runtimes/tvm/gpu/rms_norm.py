"""RMSNormalization and AddRmsNorm on a GPU (:mod:`qsparse_export.ops.add_rms_norm` has the formula): a block for each row."""

from __future__ import annotations

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from qsparse_export.runtimes.tvm.gpu.float_bits import wide
from qsparse_export.runtimes.tvm.gpu.program import Program, check_sizes
from qsparse_export.runtimes.tvm.gpu.workgroup import (
    THREADS,
    assign,
    kernel,
    reduced,
    threads,
    variable,
    when,
)


def rms_norm(*, n: int, epsilon: float, dtype: str = "float32") -> Program:
    """x [m, n] and weight [n] of ``dtype`` to y [m, n]."""
    check_sizes(n, dtype)

    def body() -> None:
        m = tirx.Var("m", "int32")
        x = T.arg("x", T.buffer((m, n), dtype))
        weight = T.arg("weight", T.buffer((n,), dtype))
        y = T.arg("y", T.buffer((m, n), dtype))
        with threads(m) as (row, _, thread):
            _normalise(x, weight, y, row, thread, n, epsilon, dtype)

    return Program((kernel("rms_norm", body),), ("x", "weight"), ("y",))


def add_rms_norm(*, n: int, epsilon: float, dtype: str = "float32") -> Program:
    """x and residual [m, n], weight [n] of ``dtype`` to their sum "total" and y, both [m, n]."""
    check_sizes(n, dtype)

    def body() -> None:
        m = tirx.Var("m", "int32")
        x = T.arg("x", T.buffer((m, n), dtype))
        residual = T.arg("residual", T.buffer((m, n), dtype))
        weight = T.arg("weight", T.buffer((n,), dtype))
        total = T.arg("total", T.buffer((m, n), dtype))
        y = T.arg("y", T.buffer((m, n), dtype))
        with threads(m) as (row, _, thread):
            with T.serial(0, -(-n // THREADS)) as r, when(r * THREADS + thread < n):
                column = T.bind(r * THREADS + thread)
                assign(total, T.Cast(dtype, wide(x[row, column]) + wide(residual[row, column])), row, column)
            _normalise(total, weight, y, row, thread, n, epsilon, dtype)  # each thread reads what it has written

    return Program((kernel("add_rms_norm", body),), ("x", "residual", "weight"), ("total", "y"))


def _normalise(
    x: tirx.Buffer,
    weight: tirx.Buffer,
    y: tirx.Buffer,
    row: tirx.Var,
    thread: tirx.Var,
    n: int,
    epsilon: float,
    dtype: str,
) -> None:
    """``y = x / sqrt(mean(x^2) + epsilon) * weight`` of one row."""
    rounds = -(-n // THREADS)
    squares = variable("float32", 0.0)
    with T.serial(0, rounds) as r, when(r * THREADS + thread < n):
        value = T.bind(wide(x[row, r * THREADS + thread]))
        assign(squares, squares[0] + value * value)
    mean = reduced(squares[0], "float32", thread, lambda a, b: a + b) / T.float32(n)
    factor = T.bind(T.float32(1) / T.sqrt(mean + T.float32(epsilon)))
    with T.serial(0, rounds) as r, when(r * THREADS + thread < n):
        column = T.bind(r * THREADS + thread)
        assign(y, T.Cast(dtype, wide(x[row, column]) * factor * wide(weight[column])), row, column)
