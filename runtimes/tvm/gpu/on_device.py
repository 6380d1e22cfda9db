"""Whether a whole graph can run on a GPU: TVM's runtime computes some ops on the CPU, and hands on what lies there."""

from __future__ import annotations

from typing import Any

from tvm import ir, relax

from qsparse_export.errors import ExportError


def require_on_device(module: ir.IRModule, target: str) -> None:
    """ExportError for a ``module`` of Relax with an op that TVM 0.27 has no kernel for, but a function of its runtime."""
    found: set[str] = set()

    def visit(expression: Any) -> None:
        if (
            isinstance(expression, ir.Call)
            and isinstance(expression.op, ir.Op)
            and expression.op.get_attr("FCallPacked")
        ):
            found.add(expression.op.name.removeprefix("relax."))

    for function in module.functions.values():
        if isinstance(function, relax.Function):
            relax.analysis.post_order_visit(function, visit)
    if found:
        raise ExportError(
            f"TVM computes {', '.join(sorted(found))} on the CPU, and all of a graph runs on the GPU of target {target}; a "
            "mixture of experts as this package writes it has no such op after the pass lower-experts (--passes default); "
            "export others with --runtime ort, or for a CPU"
        )
