"""GatedActivation on a GPU (:mod:`qsparse_export.ops.gated_activation` has the formulas): a thread for each output."""

from __future__ import annotations

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from qsparse_export.errors import UsageError, near_names
from qsparse_export.runtimes.tvm.gpu.float_bits import wide
from qsparse_export.runtimes.tvm.gpu.program import Program, check_sizes
from qsparse_export.runtimes.tvm.gpu.workgroup import THREADS, assign, kernel, threads, when
from qsparse_export.runtimes.tvm.kernels.gated_activation import ACTIVATIONS


def gated_activation(*, n: int, activation: str, dtype: str = "float32") -> Program:
    """x [m, 2n] of ``dtype``, the gate and then what it gates, to y float32 [m, n]; ``activation`` is of ACTIVATIONS.

    A square does not fit into float16.
    """
    check_sizes(n, dtype)
    if activation not in ACTIVATIONS:
        raise UsageError(f"there is no activation {activation!r}; {near_names(activation, ACTIVATIONS)}")
    activate = ACTIVATIONS[activation]

    def body() -> None:
        m = tirx.Var("m", "int32")
        x = T.arg("x", T.buffer((m, 2 * n), dtype))
        y = T.arg("y", T.buffer((m, n), "float32"))
        with threads(m, -(-n // THREADS)) as (row, tile, thread):
            column = T.bind(tile * THREADS + thread)
            with when(column < n):
                activated = activate(T.bind(wide(x[row, column])), 1)
                assign(y, activated * wide(x[row, column + n]), row, column)

    return Program((kernel("gated_activation", body),), ("x",), ("y",))
