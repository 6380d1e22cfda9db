"""How many kernels one decode step launches on ONNX Runtime's CUDA provider, node by node.

Of ours: as runtimes/cuda launches them for a single row. Of the provider: one for each node that computes on the GPU, but for
those that ``_OF_PROVIDER`` names. tests/cuda counts the launches of whole models on a stand-in for CUDA.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from qsparse_export.bench.dense_graph import rescales, selects
from qsparse_export.ops.base import DOMAIN

if TYPE_CHECKING:
    import onnx_ir as ir

_QUANTISE_MULTIPLY_FINISH = 3
_MULTIPLY_FINISH = 2
OWN = {
    "TopKSparsify": 0,
    "TernaryMatMul": _QUANTISE_MULTIPLY_FINISH,
    "SparseTernaryMatMul": _QUANTISE_MULTIPLY_FINISH,
    "SparseMatMulNBits": _MULTIPLY_FINISH,
}
"""Kernels of each op of ours that runs on a GPU, behind those that select channels and rescale."""

_OF_PROVIDER = {
    # A past of some hundred tokens is read in pieces, which a second kernel joins; a short one takes one kernel.
    "GroupQueryAttention": 2,
}
_VIEWS = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
_SHAPES = frozenset({"Constant", "Shape", "Size"})


def launches(graph: ir.Graph) -> dict[str, int]:
    """Kernels of a step of one token by op, in the order of the graph.

    None for views, for what is known before the step or from shapes alone (it is folded, or computed on the CPU), for a
    Sigmoid that ONNX Runtime joins with the product behind it, and for an op of ours without CUDA kernels, which falls back.
    """
    known = set(graph.initializers.values())
    found: Counter[str] = Counter()
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        if (node.domain == "" and node.op_type in _SHAPES) or (inputs and known.issuperset(inputs)):
            known.update(node.outputs)
        elif kernels := _kernels(node):
            found[node.op_type] += kernels
    return dict(found)


def _kernels(node: ir.Node) -> int:
    if node.domain == DOMAIN:
        return OWN[node.op_type] + _selecting(node) if node.op_type in OWN else 0
    if node.domain == "" and (node.op_type in _VIEWS or _joins_product(node)):
        return 0
    return _OF_PROVIDER.get(node.op_type, 1)


def _selecting(node: ir.Node) -> int:
    """Of the mask and the rescaling: both are left out of a product that keeps every channel as it is."""
    if not selects(node):
        return 0
    x = node.inputs[0]
    width = x.shape[-1] if x is not None and x.shape is not None else None
    k, block = (node.attributes[name].as_int() for name in ("k", "block"))
    masks = node.op_type == "TopKSparsify" or rescales(node) or k != (block or width)
    return masks + rescales(node)


def _joins_product(node: ir.Node) -> bool:
    """Whether ``node`` is the Sigmoid of ``x * Sigmoid(x)``, which ONNX Runtime calls QuickGelu."""
    readers = list(node.outputs[0].uses()) if node.op_type == "Sigmoid" else []
    return len(readers) == 1 and readers[0].node.op_type == "Mul" and node.inputs[0] in readers[0].node.inputs
