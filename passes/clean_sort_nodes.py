"""Puts the nodes into one stable topological order and drops what the exporter wrote about its own machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import TopologicalSortPass

from qsparse_export.passes.base import Pass, PassResult


@dataclass(frozen=True)
class SortNodes(Pass):
    """Every node stands after the nodes that it reads.

    Before: ``b = Relu(a); a = Neg(x)``. After: ``a = Neg(x); b = Relu(a)``.
    """

    name: ClassVar[str] = "sort-nodes"

    def call(self, model: ir.Model) -> PassResult:
        """See :class:`Pass`."""
        return TopologicalSortPass()(model)
