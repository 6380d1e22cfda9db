"""ir.Model -> ir.Model: chooses a pipeline and runs it, nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir


def lower(model: ir.Model, pipeline: str) -> str:
    """Runs the passes of the spec string ``pipeline`` on ``model`` in place; returns the normalised spec string.

    Raises UsageError for an unknown pass or option, ExportError when the result is not valid ONNX.
    """
    from qsparse_export.passes.base import parse_pipeline, run_pipeline

    passes = parse_pipeline(pipeline)
    run_pipeline(model, passes)
    return ",".join(str(step) for step in passes)
