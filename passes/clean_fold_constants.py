"""Folds what is known at export: onnxscript's optimiser under this project's contract."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnxscript.optimizer import fold_constants

from qsparse_export.errors import ExportError
from qsparse_export.passes.base import Pass, PassResult


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Computes nodes of constant inputs now, up to ``limit`` bytes of input: weights stay on the disk.

    Before: ``s = Shape(w); n = Gather(s, 0)``. After: ``n`` is an initialiser.
    """

    name: ClassVar[str] = "fold-constants"
    limit: int = 1024

    def call(self, model: ir.Model) -> PassResult:
        """See :class:`Pass`; ExportError where the optimiser gives up."""
        wrapping = {node.outputs[0].name for node in model.graph.all_nodes() if _wraps(node)}
        try:
            result = fold_constants(model, input_size_limit=self.limit, output_size_limit=self.limit)
        except RuntimeError as error:  # onnxscript 0.7 folds some sequences of constants wrongly, and then stops
            raise ExportError(f"constants cannot be folded: {error}; leave this pass out with --passes") from error
        for node in model.graph.all_nodes():
            # onnxscript 0.7 makes a Cast of a CastLike and forgets that it does not saturate.
            if node.op_type == "Cast" and node.outputs[0].name in wrapping:
                node.attributes.add(ir.AttrInt64("saturate", 0))
        return PassResult(model, result.modified)


def _wraps(node: ir.Node) -> bool:
    return node.op_type == "CastLike" and node.attributes.get_int("saturate", 1) == 0
