"""Refuses an invalid graph: the ONNX checker, full, on everything but the weights' values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import CheckerPass

from qsparse_export.errors import ExportError
from qsparse_export.passes.base import Pass, PassResult, weights_unread


@dataclass(frozen=True)
class Check(Pass):
    """Raises ExportError with the checker's words when the graph is not valid ONNX; changes nothing."""

    name: ClassVar[str] = "check"

    def call(self, model: ir.Model) -> PassResult:
        """See :class:`Pass`."""
        import onnx

        from qsparse_export import ops

        ops.register()
        try:
            with weights_unread(model):
                CheckerPass(full_check=True)(model)
        except onnx.checker.ValidationError as error:
            raise ExportError(f"the graph is not valid ONNX, which is a fault of this compiler: {error}") from error
        return PassResult(model, False)
