"""Eliminates duplicate, dead and do-nothing nodes: onnx_ir's passes under this project's contract."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    IdentityEliminationPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
)

from qsparse_export.passes.base import Pass, PassResult


@dataclass(frozen=True)
class EliminateCommon(Pass):
    """Two nodes that compute the same become one.

    Before: ``a = Cos(x); b = Cos(x)``. After: ``a = Cos(x)``, and ``b``'s uses read ``a``.
    """

    name: ClassVar[str] = "eliminate-common"

    def call(self, model: ir.Model) -> PassResult:
        """See :class:`Pass`."""
        return CommonSubexpressionEliminationPass()(model)


@dataclass(frozen=True)
class EliminateDead(Pass):
    """Removes nodes, initialisers and opset imports that no output needs.

    Before: ``a = Relu(x); b = Neg(x)``, only ``a`` used. After: ``a = Relu(x)``.
    """

    name: ClassVar[str] = "eliminate-dead"

    def call(self, model: ir.Model) -> PassResult:
        """See :class:`Pass`."""
        nodes = RemoveUnusedNodesPass()(model)
        opsets = RemoveUnusedOpsetsPass()(model)
        return PassResult(model, nodes.modified or opsets.modified)


@dataclass(frozen=True)
class EliminateIdentity(Pass):
    """Removes Identity nodes whose value has another name already.

    Before: ``a = Identity(x); b = Relu(a)``. After: ``b = Relu(x)``.
    """

    name: ClassVar[str] = "eliminate-identity"

    def call(self, model: ir.Model) -> PassResult:
        """See :class:`Pass`."""
        return IdentityEliminationPass()(model)
