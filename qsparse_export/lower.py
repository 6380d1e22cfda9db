"""ir.Model -> ir.Model: chooses a pipeline and runs it, nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

    from qsparse_export.passes.base import OnPass


def lower(model: ir.Model, pipeline: str | None, default: str, on_pass: OnPass | None = None) -> str:
    """Runs the passes of the spec string ``pipeline`` on ``model`` in place; returns the normalised spec string.

    ``pipeline`` may be an edit of ``default`` (see :func:`~qsparse_export.passes.base.parse_pipeline`); None is ``default``.
    ``on_pass`` is shown the graph after each pass. Raises UsageError for an unknown pass or option, ExportError when the
    result is not valid ONNX.
    """
    from qsparse_export.passes.base import parse_pipeline, run_pipeline

    passes = parse_pipeline(default if pipeline is None else pipeline, default)
    run_pipeline(model, passes, on_pass)
    return ",".join(str(step) for step in passes)
