"""The same model without selection: every top-k mask keeps every channel. What sparsity gains is measured against it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qsparse_export.errors import BundleError
from qsparse_export.ops.base import DOMAIN

if TYPE_CHECKING:
    import onnx_ir as ir

DENSE_GRAPH = "dense.onnx"
"""What the file is called in a bundle that was exported to be measured; its weights are those of the bundle's graph."""


def write_dense_graph(graph: Path, dense: Path) -> None:
    """Writes to ``dense`` the graph of the file ``graph`` with every mask open, its weights left where they are."""
    import onnx_ir

    model = onnx_ir.load(graph)
    keep_all_channels(model)
    onnx_ir.save(model, dense)


def selects(node: ir.Node) -> bool:
    """Whether ``node`` is an op of ours with a top-k mask; a ``k`` without a ``block`` is a number of inputs."""
    return node.domain == DOMAIN and {"k", "block"} <= node.attributes.keys()


def rescales(node: ir.Node) -> bool:
    """Whether ``node`` divides what it keeps of a row by its norm."""
    return "rescale" in node.attributes and node.attributes["rescale"].as_string() != "none"


def keep_all_channels(model: ir.Model) -> bool:
    """Opens every mask of ``model`` in place; returns whether one was closed. BundleError where a width is unknown.

    Before: ``h = TopKSparsify<k=3>(x); y = MatMul(h, w)`` or ``y = SparseTernaryMatMul<k=3>(x, w, s)``, x of width 8.
    After: ``y = MatMul(x, w)`` or ``y = SparseTernaryMatMul<k=8, block=0>(x, w, s)``. A rescaling stays: it is no selection.
    """
    import onnx_ir

    modified = False
    for node in list(model.graph.all_nodes()):
        if not selects(node):
            continue
        x = node.inputs[0]
        width = x.shape[-1] if x is not None and x.shape is not None else None
        if node.op_type == "TopKSparsify" and not rescales(node):
            assert x is not None and node.graph is not None
            node.outputs[0].replace_all_uses_with(x)
            node.graph.remove(node, safe=True)
            modified = True
            continue
        if not isinstance(width, int):
            raise BundleError(f"the node {node.name} has no known width to keep all of; export the bundle again")
        modified |= (node.attributes["k"].as_int(), node.attributes["block"].as_int()) != (width, 0)
        node.attributes["k"] = onnx_ir.AttrInt64("k", width)
        node.attributes["block"] = onnx_ir.AttrInt64("block", 0)
    return modified
