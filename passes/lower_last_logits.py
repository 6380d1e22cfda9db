"""Leaves a decoder the logits of the last position alone, all that generating text reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qsparse_export.passes.annotate_scope import SCOPE
from qsparse_export.passes.base import Pass, PassResult

# What a head may be: a product whose rows are positions, and what follows it element by element.
_PRODUCTS = ("MatMul", "DenseMatMulNBits", "SparseMatMul", "SparseMatMulNBits", "TernaryMatMul", "SparseTernaryMatMul")
_ELEMENTWISE = ("Cast", "Add", "Mul", "Identity")
_END = 2**63 - 1


@dataclass(frozen=True)
class LastLogits(Pass):
    """The head reads the last position's row. Prompts are padded on the left, so that it is the last token of each.

    Before::

        logits = MatMul(h, head)                      # [batch, sequence, vocab]

    After::

        last = Slice(h, starts=[-1], ends=[2^63 - 1], axes=[1])
        logits = MatMul(last, head)                   # [batch, 1, vocab]

    A prompt of S tokens costs S - 1 products with the head less. Perplexity needs all positions, and is refused then.
    :func:`explain` says why a graph stays as it is.
    """

    name: ClassVar[str] = "last-logits"

    def call(self, model: ir.Model) -> PassResult:
        """See :class:`Pass`."""
        path = _path_to_product(model.graph)
        if isinstance(path, str):
            return PassResult(model, False)
        product = path[-1]
        hidden = product.inputs[0]
        assert hidden is not None
        last = _last_row(model.graph, product, hidden)
        product.replace_input_with(0, last)
        for node in path:
            output = node.outputs[0]
            if output.shape is not None:
                output.shape = ir.Shape([output.shape[0], 1, output.shape[2]])
        return PassResult(model, True)


def explain(graph: ir.Graph) -> str:
    """Why the logits of ``graph`` are left as they are, or "" where they are not."""
    path = _path_to_product(graph)
    return path if isinstance(path, str) else ""


def _path_to_product(graph: ir.Graph) -> list[ir.Node] | str:
    """The nodes from the one that makes ``logits`` back to the product, which nothing else reads; or why there are none."""
    logits = next((value for value in graph.outputs if value.name == "logits"), None)
    if logits is None or logits.shape is None or len(logits.shape) != 3:
        return "the graph has no output logits [batch, sequence, vocab]"
    if logits.shape[1] == 1:
        return "the logits are of one position already"
    path: list[ir.Node] = []
    value: ir.Value | None = logits
    while value is not None and (node := value.producer()) is not None:
        read_once = value is logits or (len(tuple(value.uses())) == 1 and not value.is_graph_output())
        if len(node.outputs) != 1 or not read_once:
            break
        path.append(node)
        if node.op_type in _PRODUCTS:
            return path
        if node.op_type not in _ELEMENTWISE or not all(_is_per_output(operand) for operand in node.inputs[1:]):
            break
        value = node.inputs[0]
    found = logits.producer()
    return (
        f"logits come from {found.op_type if found else 'an input'}; expected a product with the head, alone or with a bias "
        "or a scale behind it"
    )


def _is_per_output(operand: ir.Value | None) -> bool:
    """Whether ``operand`` is a constant that is the same for all positions."""
    return operand is not None and operand.const_value is not None and len(operand.const_value.shape) <= 1


def _last_row(graph: ir.Graph, product: ir.Node, hidden: ir.Value) -> ir.Value:
    operands = [_constant(graph, f"last_logits.{name}", number) for name, number in _OPERANDS]
    scope = product.metadata_props.get(SCOPE)
    cut = ir.node("Slice", [hidden, *operands], metadata_props={SCOPE: scope} if scope else None)
    last = cut.outputs[0]
    last.name, last.type = "last_logits.hidden", hidden.type
    if hidden.shape is not None:
        last.shape = ir.Shape([hidden.shape[0], 1, hidden.shape[2]])
    graph.insert_before(product, cut)
    return last


_OPERANDS = (("starts", -1), ("ends", _END), ("axes", 1))


def _constant(graph: ir.Graph, name: str, number: int) -> ir.Value:
    tensor = ir.tensor(np.array([number], np.int64), name=name)
    value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1]))
    graph.register_initializer(value)
    return value
