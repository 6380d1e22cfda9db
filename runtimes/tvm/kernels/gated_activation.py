"""GatedActivation over rows (:mod:`qsparse_export.ops.gated_activation` has the formulas)."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from qsparse_export.runtimes.tvm.kernels.emit import for_rows, in_vectors, load, store, vector
from qsparse_export.runtimes.tvm.kernels.exponential import exponential
from qsparse_export.runtimes.tvm.lanes import Lanes


def gated_activation(lanes: Lanes, *, n: int, activation: str) -> tirx.PrimFunc:
    """x float32 [M, 2n], the gate and then what it gates, to y float32 [M, n]; ``activation`` is of ACTIVATIONS."""
    m = tirx.Var("m", "int64")
    activate = ACTIVATIONS[activation]
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("gated_activation")
        T.func_attr({"tirx.noalias": True})
        x = T.arg("x", T.buffer((m, 2 * n), "float32"))
        y = T.arg("y", T.buffer((m, n), "float32"))

        def row_of(row: Any) -> None:
            def gate(column: Any, width: int) -> None:
                activated = activate(T.bind(load(x, [row], column, width)), width)
                store(y, activated * load(x, [row], column + n, width), [row], column, width)

            in_vectors(n, lanes.floats, gate)

        for_rows(m, row_of)
    return builder.get()


def _relu2(gate: Any, width: int) -> Any:
    # A NaN is not below 0 and stays.
    positive = T.bind(T.Select(gate < vector(0.0, "float32", width), vector(0.0, "float32", width), gate))
    return positive * positive


def _silu(gate: Any, width: int) -> Any:
    negative = gate < vector(0.0, "float32", width)
    power = exponential(
        T.Select(negative, gate, vector(0.0, "float32", width) - gate), width
    )  # exp(-|gate|) cannot overflow
    numerator = T.Select(negative, power, vector(1.0, "float32", width))
    return gate * (numerator / (vector(1.0, "float32", width) + power))


ACTIVATIONS = {"relu2": _relu2, "silu": _silu}
"""Name to what is done with the lanes of a gate: function(gate, lanes)."""
