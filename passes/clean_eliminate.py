"""Eliminates duplicate, dead and do-nothing nodes: onnx_ir's passes under this project's contract."""

from __future__ import annotations

from collections.abc import Iterator
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
        # onnx-ir 1.1 gives the input the name of the output where that is a graph's output: wrong for an input that is an
        # output too, or that belongs to the graph around it. Those nodes are out of its sight meanwhile.
        held = [node for node in _identities(model) if _must_stay(node)]
        for node in held:
            node.domain = _HELD
        try:
            return IdentityEliminationPass()(model)
        finally:
            for node in held:
                node.domain = ""


_HELD = "ai.qsparse.held"


def _identities(model: ir.Model) -> Iterator[ir.Node]:
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        yield from (node for node in graph.all_nodes() if node.domain == "" and node.op_type == "Identity")


def _must_stay(node: ir.Node) -> bool:
    source = node.inputs[0]
    if source is None or not node.outputs[0].is_graph_output():
        return False
    producer = source.producer()
    return source.is_graph_output() or producer is None or producer.graph is not node.graph
