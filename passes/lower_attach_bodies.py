"""Gives every custom op its function body in standard ops, so that any ONNX runtime can run the file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qsparse_export.passes.base import Pass, PassResult


@dataclass(frozen=True)
class AttachBodies(Pass):
    """Adds to ``model.functions`` the body of each ``ai.qsparse`` op that the graph uses.

    Before: a node ``ai.qsparse::TopKSparsify``, no function. After: the same node, and a model-local function of that
    domain and name; a runtime with the kernel library registered never looks at it.
    """

    name: ClassVar[str] = "attach-bodies"

    def call(self, model: ir.Model) -> PassResult:
        """See :class:`Pass`."""
        from qsparse_export import ops

        before = set(model.functions)
        ops.attach_functions(model)
        return PassResult(model, set(model.functions) != before)
