"""ir.Model -> ir.Model: chooses a pipeline and runs it, nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as ir

    from qsparse_export.passes.base import OnPass


@dataclass(frozen=True)
class Lowered:
    """What lowering did: the normalised spec string, which does it again, and the nodes of the main graph around it."""

    pipeline: str
    nodes_before: int
    nodes_after: int

    def to_dict(self) -> dict[str, Any]:
        """``pipeline`` and ``nodes`` of the manifest."""
        return {"pipeline": self.pipeline, "nodes": {"before": self.nodes_before, "after": self.nodes_after}}


def lower(model: ir.Model, pipeline: str | None, default: str, on_pass: OnPass | None = None) -> Lowered:
    """Runs the passes of the spec string ``pipeline`` on ``model`` in place.

    ``pipeline`` may be an edit of ``default`` (see :func:`~qsparse_export.passes.base.parse_pipeline`); None is ``default``.
    ``on_pass`` is shown the graph after each pass. Raises UsageError for an unknown pass or option, ExportError when the
    result is not valid ONNX.
    """
    from qsparse_export.passes.base import parse_pipeline, run_pipeline

    passes = parse_pipeline(default if pipeline is None else pipeline, default)
    before = len(model.graph)
    run_pipeline(model, passes, on_pass)
    return Lowered(",".join(str(step) for step in passes), before, len(model.graph))
