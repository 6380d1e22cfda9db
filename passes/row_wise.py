"""Which parts of a graph compute every row (everything at one place of axis 0) from that row and constants alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from qsparse_export.passes.match import STANDARD
from qsparse_export.passes.static_values import elements

_ELEMENT_WISE = frozenset(
    {
        *("Abs", "Add", "Cast", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "Identity"),
        *("LeakyRelu", "Log", "Max", "Min", "Mul", "Neg", "Pow", "Reciprocal", "Relu", "Sigmoid", "Softplus", "Sqrt"),
        *("Sub", "Tanh"),
    }
)
_LAST_AXIS = frozenset({"LayerNormalization", "RMSNormalization", "Softmax"})
_OURS = {
    "AddRmsNorm": 2,
    "DenseMatMulNBits": 1,
    "GatedActivation": 1,
    "SparseMatMul": 1,
    "SparseMatMulNBits": 1,
    "SparseTernaryMatMul": 1,
    "TernaryMatMul": 1,
    "TopKSparsify": 1,
}
"""Ops of ours that compute along the last axis, and how many of their inputs are activations."""


@dataclass(frozen=True)
class Region:
    """``nodes`` from ``starts`` on, in no order: nothing else reads what they make, but for the result that was asked for."""

    starts: tuple[ir.Node, ...]
    nodes: tuple[ir.Node, ...]


def region_of(result: ir.Value, is_start: Callable[[ir.Node], bool]) -> Region | str:
    """What computes ``result`` from the outputs of nodes that are starts, or why that is not row by row.

    All ranks must be known: the pass infer-shapes comes before.
    """
    starts: dict[ir.Node, None] = {}
    nodes: dict[ir.Node, None] = {}
    open_values = [result]
    while open_values:
        value = open_values.pop()
        node = value.producer()
        if node is None:
            return f"{value.name} is neither a weight nor of these rows"
        if node in starts or node in nodes:
            continue
        if is_start(node):
            starts[node] = None
            continue
        nodes[node] = None
        open_values.extend(each for each in node.inputs if each is not None and not is_constant(each))
    for node in nodes:
        if not _is_row_wise(node):
            return f"{node.op_type} {node.outputs[0].name} may mix rows"
    inside = {*starts, *nodes}
    for value in (value for node in inside for value in node.outputs if value is not result):
        if value.is_graph_output() or any(use.node not in inside for use in value.uses()):
            return f"{value.name} is read elsewhere too"
    return Region(tuple(starts), tuple(nodes))


def is_constant(value: ir.Value) -> bool:
    """Whether ``value`` is a weight or a constant."""
    producer = value.producer()
    return value.is_initializer() or (producer is not None and producer.op_type == "Constant")


def rank_of(value: ir.Value | None) -> int | None:
    """The number of axes, None where it is not known."""
    return None if value is None or value.shape is None else len(value.shape)


def _is_row_wise(node: ir.Node) -> bool:
    """Whether ``node`` keeps axis 0, and computes along it row by row; its inputs are constants or have that axis 0."""
    moving = [value for value in node.inputs if value is not None and not is_constant(value)]
    constants = [value for value in node.inputs if value is not None and is_constant(value)]
    ranks = {rank_of(value) for value in moving}
    rank = next(iter(ranks), None)
    if len(ranks) != 1 or rank is None or rank == 0:
        return False
    first_alone = len(moving) == 1 and moving[0] is node.inputs[0]
    if node.domain == "ai.qsparse":
        activations = _OURS.get(node.op_type, 0)
        return rank > 1 and len(moving) == activations and set(moving) == set(node.inputs[:activations])
    if node.domain not in STANDARD:
        return False
    if node.op_type in _ELEMENT_WISE:
        return all(_is_same_for_all_rows(value, rank) for value in constants)
    if not first_alone:
        return False
    if node.op_type == "Unsqueeze":
        return _axis_is_behind(node, rank + 1)
    return rank > 1 and _is_along_last_axis(node, rank, constants)


def _is_along_last_axis(node: ir.Node, rank: int, constants: list[ir.Value]) -> bool:
    """Of standard ops with one input that is no constant, of ``rank`` axes, two or more."""
    if node.op_type in _LAST_AXIS:
        axis = node.attributes.get_int("axis", -1)
        return axis in (-1, rank - 1) and all(_is_same_for_all_rows(value, rank) for value in constants)
    if node.op_type == "MatMul":
        return rank_of(node.inputs[1]) == 2
    if node.op_type == "Gemm":
        is_plain = node.attributes.get_int("transA", 0) == 0
        return is_plain and all(_is_same_for_all_rows(value, rank) for value in constants[1:])
    return node.op_type == "Split" and node.attributes.get_int("axis", 0) in (-1, *range(1, rank))


def _is_same_for_all_rows(constant: ir.Value, rank: int) -> bool:
    """Whether ``constant``, broadcast to ``rank`` axes, is the same at each place of axis 0."""
    shape = constant.shape
    return shape is not None and (len(shape) < rank or (len(shape) == rank and shape[0] == 1))


def _axis_is_behind(node: ir.Node, rank: int) -> bool:
    """Whether Unsqueeze puts its one axis behind axis 0 of what it makes, which has ``rank``."""
    axes = elements(node.inputs[1])
    return axes is not None and axes.size == 1 and int(axes.item()) % rank != 0
