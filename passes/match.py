"""Questions that rules ask of nodes and values; the last two do what most rewrites end with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import onnx_ir as ir

STANDARD = ("", "ai.onnx")


def is_op(node: ir.Node | None, op_type: str, domain: str = "") -> TypeGuard[ir.Node]:
    """Whether ``node`` is the op ``op_type`` of ``domain`` (the standard one by default)."""
    return node is not None and node.op_type == op_type and node.domain in ((domain,) if domain else STANDARD)


def other_input(node: ir.Node, position: int) -> ir.Value | None:
    """The other of two inputs."""
    return node.inputs[1 - position]


def sole_reader(value: ir.Value | None, reader: ir.Node) -> bool:
    """Whether nothing but ``reader`` reads ``value``."""
    return value is not None and not value.is_graph_output() and all(use.node is reader for use in value.uses())


def scalar(value: ir.Value | None) -> float | None:
    """The number that a constant of one element holds, None for anything else."""
    if value is None:
        return None
    tensor = value.const_value
    producer = value.producer()
    if tensor is None and is_op(producer, "Constant") and "value" in producer.attributes:
        tensor = producer.attributes["value"].as_tensor()
    return float(tensor.numpy().item()) if tensor is not None and tensor.size == 1 else None


def same_shape(first: ir.Value | None, second: ir.Value | None) -> bool:
    """Whether both shapes are known and equal, symbolic dimensions by name."""
    if first is None or second is None or first.shape is None or second.shape is None:
        return False
    dims = [[dim if isinstance(dim, int) else dim.value for dim in shape] for shape in (first.shape, second.shape)]
    return dims[0] == dims[1] and None not in dims[0]


def replaced(old: ir.Value, new: ir.Value) -> None:
    """Makes ``new`` stand for ``old``: its name, type, shape and every use, also as an output of the graph."""
    new.type, new.shape, new.name = old.type, old.shape, old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def drop_unused(graph: ir.Graph, values: Sequence[ir.Value | None]) -> None:
    """Removes those of ``values`` that are initialisers of ``graph`` and that nothing reads."""
    for value in values:
        if value is not None and value.is_initializer() and not value.uses() and value.name is not None:
            graph.initializers.pop(value.name, None)
