"""Lets the head read the embedding where it lies: one matrix in the file and in memory, not a transposed second one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qsparse_export.passes.annotate_scope import SCOPE
from qsparse_export.passes.base import Pass, PassResult


@dataclass(frozen=True)
class FuseTiedHead(Pass):
    """A product with the transpose of an initialiser that has other readers becomes Gemm(transB=1) on it.

    Runtimes fold Transpose of a constant, which would store the tied embedding twice.

    Before: ``e = Gather(W, ids); ...; t = Transpose(W); y = MatMul(x, t)`` with x [..., K], W [N, K].
    After: ``y = Reshape(Gemm(Reshape(x, [-1, K]), W, transB=1), [..., N])``, and W is stored once.
    """

    name: ClassVar[str] = "fuse-tied-head"

    def call(self, model: ir.Model) -> PassResult:
        """See :class:`Pass`."""
        modified = False
        for node in list(model.graph):
            weight = _tied_weight(node)
            if weight is not None:
                _rewrite(model.graph, node, weight)
                modified = True
        return PassResult(model, modified)


def _tied_weight(node: ir.Node) -> ir.Value | None:
    """W when ``node`` is MatMul(x, Transpose(W)), W a shared 2-D initialiser, and the transpose has no other reader."""
    if node.op_type != "MatMul" or node.domain:
        return None
    transposed = node.inputs[1]
    producer = transposed.producer() if transposed is not None else None
    if transposed is None or producer is None or producer.op_type != "Transpose" or len(transposed.uses()) != 1:
        return None
    weight = producer.inputs[0]
    if weight is None or not weight.is_initializer() or weight.shape is None or len(weight.shape) != 2:
        return None
    permutation = producer.attributes.get("perm")
    if permutation is not None and list(permutation.as_ints()) != [1, 0]:
        return None
    return weight if len(weight.uses()) > 1 else None


def _rewrite(graph: ir.Graph, matmul: ir.Node, weight: ir.Value) -> None:
    x, y = matmul.inputs[0], matmul.outputs[0]
    transpose = matmul.inputs[1].producer()  # type: ignore[union-attr]  # matched by _tied_weight
    assert x is not None and transpose is not None and weight.shape is not None
    outputs, inputs = (int(dim) for dim in weight.shape)  # type: ignore[arg-type]  # an initialiser's are static
    rows_shape = _initializer(graph, f"{y.name}.rows_shape", [-1, inputs])
    width = _initializer(graph, f"{y.name}.width", [outputs])
    rows = ir.node("Reshape", [x, rows_shape])
    gemm = ir.node("Gemm", [rows.outputs[0], weight], attributes={"transB": 1})
    leading = ir.node("Shape", [x], attributes={"start": 0, "end": -1})
    shape = ir.node("Concat", [leading.outputs[0], width], attributes={"axis": 0})
    result = ir.node("Reshape", [gemm.outputs[0], shape.outputs[0]])
    new = [rows, gemm, leading, shape, result]
    for node, suffix in zip(new, ("rows", "gemm", "leading", "shape", "result"), strict=True):
        node.outputs[0].name = f"{y.name}.{suffix}"
        if SCOPE in matmul.metadata_props:
            node.metadata_props[SCOPE] = matmul.metadata_props[SCOPE]
    graph.insert_before(matmul, new)
    result.outputs[0].type, result.outputs[0].shape = y.type, y.shape
    name = y.name
    ir.convenience.replace_all_uses_with(y, result.outputs[0], replace_graph_outputs=True)
    graph.remove([matmul], safe=True)
    graph.remove([transpose], safe=True)
    result.outputs[0].name = name


def _initializer(graph: ir.Graph, name: str, values: list[int]) -> ir.Value:
    value = ir.val(name, const_value=ir.tensor(np.array(values, np.int64), name=name))
    graph.register_initializer(value)
    return value
