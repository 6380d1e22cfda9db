"""Fuses the activation of a gated feed-forward block whose two products come out of one node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qsparse_export.passes.annotate_scope import SCOPE
from qsparse_export.passes.base import Pass, PassResult
from qsparse_export.passes.match import drop_unused, is_op, other_input, replaced, scalar

DOMAIN = "ai.qsparse"


@dataclass(frozen=True)
class FuseGlu(Pass):
    """Makes ``GatedActivation`` of the Split of gate and up, the squared ReLU or SiLU of the gate, and the product.

    Before::

        gate, up = Split<axis=-1>(x)                      # equal halves
        y = Mul(Pow(Relu(gate), 2), up)                   # or Mul(Mul(gate, Sigmoid(gate)), up)

    After::

        y = GatedActivation<activation="relu2">(x)        # or "silu"

    float16 inputs, with or without Casts to float32 in between, are read as they are; the product is float32, and a Cast
    follows where the original had rounded it. Gate and up from two nodes are left alone: joining them costs what fusing
    saves.
    """

    name: ClassVar[str] = "fuse-glu"

    def call(self, model: ir.Model) -> PassResult:
        """See :class:`Pass`."""
        modified = False
        for node in list(model.graph):
            match = _match(node)
            if isinstance(match, _Match):
                _rewrite(model.graph, match)
                modified = True
        return PassResult(model, modified)


@dataclass(frozen=True)
class _Match:
    """``nodes`` are all that go, readers before what they read; the first is the product, the last the Split."""

    activation: str
    nodes: tuple[ir.Node, ...]


def explain(node: ir.Node) -> str:
    """Why the product ``node`` is not fused, or "" where it is."""
    match = _match(node)
    return match if isinstance(match, str) else ""


def _match(node: ir.Node) -> _Match | str:
    if not is_op(node, "Mul"):
        return "not a product"
    reason = "neither side is a squared ReLU or a SiLU"
    for side, other in ((0, 1), (1, 0)):
        activated = _activated(node.inputs[side])
        if activated is None:
            continue
        activation, gate, inner = activated
        up, up_casts = _through_cast(node.inputs[other])
        source, gate_casts = _through_cast(gate)
        found = _split(source, up)
        if isinstance(found, str):
            reason = found
            continue
        nodes = (node, *inner, *gate_casts, *up_casts, found)
        gone = {id(n) for n in nodes}
        for member in nodes[1:]:
            for output in member.outputs:
                if output.is_graph_output() or any(id(use.node) not in gone for use in output.uses()):
                    return f"{output.name} is read elsewhere too"
        return _Match(activation, nodes)
    return reason


def _activated(value: ir.Value | None) -> tuple[str, ir.Value, tuple[ir.Node, ...]] | None:
    """The activation that made ``value``, its gate, and its nodes."""
    node = value.producer() if value is not None else None
    if node is None:
        return None
    if is_op(node, "Pow") and scalar(node.inputs[1]) == 2.0:
        relu = node.inputs[0].producer() if node.inputs[0] is not None else None
        if is_op(relu, "Relu") and relu.inputs[0] is not None:
            return "relu2", relu.inputs[0], (node, relu)
    if is_op(node, "Mul"):
        if node.inputs[0] is node.inputs[1]:
            relu = node.inputs[0].producer() if node.inputs[0] is not None else None
            if is_op(relu, "Relu") and relu.inputs[0] is not None:
                return "relu2", relu.inputs[0], (node, relu)
        for position in (0, 1):
            factor = node.inputs[position]
            sigmoid = factor.producer() if factor is not None else None
            gate = other_input(node, position)
            if is_op(sigmoid, "Sigmoid") and gate is not None and sigmoid.inputs[0] is gate:
                return "silu", gate, (node, sigmoid)
    return None


def _through_cast(value: ir.Value | None) -> tuple[ir.Value | None, tuple[ir.Node, ...]]:
    node = value.producer() if value is not None else None
    if not is_op(node, "Cast") or node.attributes["to"].as_int() != ir.DataType.FLOAT:
        return value, ()
    source = node.inputs[0]
    return (source, (node,)) if source is not None and source.dtype == ir.DataType.FLOAT16 else (value, ())


def _split(gate: ir.Value | None, up: ir.Value | None) -> ir.Node | str:
    split = gate.producer() if gate is not None else None
    if not is_op(split, "Split") or up is None or up.producer() is not split:
        return "gate and up come from two nodes: joining them costs what fusing saves"
    if len(split.outputs) != 2 or (gate is not split.outputs[0]) or (up is not split.outputs[1]):
        return "the Split does not give the gate first and what it gates second"
    x = split.inputs[0]
    axis = split.attributes["axis"].as_int() if "axis" in split.attributes else 0
    if x is None or x.shape is None or axis not in (-1, len(x.shape) - 1):
        return "the Split is not along the last axis"
    widths = [value.shape[-1] if value.shape is not None else None for value in split.outputs]
    if not isinstance(widths[0], int) or widths[0] != widths[1]:
        return f"gate and up are {widths[0]} and {widths[1]} wide"
    if x.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return f"the kernel takes no {x.dtype}"
    return split


def _rewrite(graph: ir.Graph, match: _Match) -> None:
    product, split = match.nodes[0], match.nodes[-1]
    result = product.outputs[0]
    scope = product.metadata_props.get(SCOPE)
    metadata = {SCOPE: scope} if scope else {}
    fused = ir.node(
        "GatedActivation",
        [split.inputs[0]],
        attributes={"activation": match.activation},
        domain=DOMAIN,
        metadata_props=dict(metadata),
    )
    made = [fused]
    if result.dtype == ir.DataType.FLOAT16:
        wide = fused.outputs[0]
        wide.name, wide.type, wide.shape = f"{result.name}.wide", ir.TensorType(ir.DataType.FLOAT), result.shape
        made.append(ir.node("Cast", [wide], attributes={"to": int(ir.DataType.FLOAT16)}, metadata_props=dict(metadata)))
    graph.insert_before(product, made)
    replaced(result, made[-1].outputs[0])
    sizes = split.inputs[1:]
    graph.remove(match.nodes, safe=True)
    drop_unused(graph, sizes)
