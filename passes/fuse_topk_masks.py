"""Recognises top-k masks as other exporters spell them: what is kept, of which value, and how many per row.

ONNX defines what torch.topk leaves open: of equal values TopK takes the lowest index, as TopKSparsify does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from qsparse_export.passes.static_values import elements

_MIRRORED = {"Greater": "Less", "Less": "Greater", "GreaterOrEqual": "LessOrEqual", "LessOrEqual": "GreaterOrEqual"}
_FLOATS = (ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.BFLOAT16)


class NoMatch(Exception):
    """A TopK is near, and what is done with it is not TopKSparsify; the message says why."""

    def __init__(self, topk: ir.Node, reason: str) -> None:
        super().__init__(reason)
        self.topk = topk


@dataclass(frozen=True)
class Mask:
    """True (or 1) exactly at the ``k`` largest ``abs(source)`` of each row, or everywhere else when ``inverted``.

    ``source`` is as it comes, without the casts that lose nothing. ``ties`` says what becomes of equal magnitudes at the
    edge: the lowest index wins, or all are kept (a comparison with the smallest selected magnitude).
    """

    topk: ir.Node
    source: ir.Value
    k: int
    inverted: bool = False
    ties: Literal["lowest", "all"] = "lowest"

    def flipped(self) -> Mask:
        """The complement."""
        return Mask(self.topk, self.source, self.k, not self.inverted, self.ties)


def produced_by(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The standard node of one of ``op_types`` that computes ``value``, if any."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.domain == "" and node.op_type in op_types else None


def root(value: ir.Value | None) -> ir.Value | None:
    """``value`` without the Identity and Cast nodes that it came through, as far as those lose nothing."""
    while (node := produced_by(value, "Identity", "Cast")) is not None:
        source = node.inputs[0]
        if node.op_type == "Cast" and not _is_lossless(source, node.outputs[0].dtype):
            return value
        value = source
    return value


def _is_lossless(source: ir.Value | None, target: ir.DataType | None) -> bool:
    """Whether a cast keeps every value: a wider type, or the type that the values had before they were widened."""
    while source is not None and source.dtype in _FLOATS:
        if target in (source.dtype, ir.DataType.FLOAT, ir.DataType.DOUBLE):
            return True
        # These give one of their input's values, or its magnitude.
        node = produced_by(source, "Cast", "Abs", "Neg", "Identity", "ReduceMax")
        source = node.inputs[0] if node is not None else None
    return False


def is_filled_with(value: ir.Value | None, number: float) -> bool:
    """Whether every element is ``number``: a constant, or one that was expanded to a shape computed in the graph."""
    while (node := produced_by(value, "Expand", "Cast", "Identity", "Reshape", "Unsqueeze")) is not None:
        value = node.inputs[0]
    if (node := produced_by(value, "ConstantOfShape")) is not None:
        fill = node.attributes.get("value")
        return (0.0 if fill is None else float(fill.as_tensor().numpy().item())) == number
    known = elements(value)
    return known is not None and known.size > 0 and bool((known == number).all())


def same_shape(a: ir.Value | None, b: ir.Value | None) -> bool:
    """Whether two values provably have the same shape: by shape inference, or since one was made in the shape of the other."""
    if a is None or b is None:
        return False
    if a is b or _same_known_shape(a, b):
        return True
    first, second = _shape_source(a), _shape_source(b)
    return first is second or _same_known_shape(first, second)


def _same_known_shape(a: ir.Value, b: ir.Value) -> bool:
    if a.shape is None or b.shape is None or len(a.shape) != len(b.shape):
        return False
    return all(
        one == other and (isinstance(one, int) or one.value is not None)
        for one, other in zip(a.shape.dims, b.shape.dims, strict=True)
    )


def _shape_source(value: ir.Value) -> ir.Value:
    """The value that ``value`` has its shape from."""
    while True:
        made = produced_by(value, "Expand", "ConstantOfShape")
        if made is not None:
            shape = produced_by(made.inputs[-1], "Shape")
            if shape is None or shape.attributes.get_int("start", 0) != 0 or "end" in shape.attributes:
                return value
            # What is expanded by broadcasting must not be larger than the shape asked for.
            if made.op_type == "Expand" and not _is_scalar(made.inputs[0]):
                return value
            source = shape.inputs[0]
        else:
            same = produced_by(value, "Cast", "Identity", "Abs", "Neg", "Not", "ScatterElements", "Relu")
            source = same.inputs[0] if same is not None else None
        if source is None:
            return value
        value = source


def _is_scalar(value: ir.Value | None) -> bool:
    return value is not None and value.shape is not None and all(dim == 1 for dim in value.shape.dims)


def last_axis(axis: int, value: ir.Value | None) -> bool:
    """Whether ``axis`` is the last one of ``value``."""
    rank = len(value.shape) if value is not None and value.shape is not None else None
    return axis == -1 or (rank is not None and axis == rank - 1)


def mask_of(value: ir.Value | None, depth: int = 16) -> Mask | None:
    """The top-k mask that ``value`` is, None when it has nothing to do with one; NoMatch when it is nearly one."""
    if depth == 0:
        return None
    node = produced_by(
        value, "Cast", "Identity", "Not", "ScatterElements", "Equal", "Greater", "GreaterOrEqual", "LessOrEqual", "Less",
        "Sub", "Where", "ReduceSum", "ReduceMax",
    )  # fmt: skip
    if node is None:
        return None
    if node.op_type in ("Cast", "Identity"):
        return mask_of(node.inputs[0], depth - 1)
    if node.op_type == "Not":
        return _flipped(mask_of(node.inputs[0], depth - 1))
    if node.op_type == "ScatterElements":
        return _scattered(node)
    if node.op_type in ("ReduceSum", "ReduceMax"):
        return _summed_one_hot(node)
    if node.op_type == "Sub":  # 1 - mask
        return _flipped(mask_of(node.inputs[1], depth - 1)) if is_filled_with(node.inputs[0], 1) else None
    if node.op_type == "Where":
        condition, yes, no = node.inputs
        if is_filled_with(yes, 1) and is_filled_with(no, 0):
            return mask_of(condition, depth - 1)
        if is_filled_with(yes, 0) and is_filled_with(no, 1):
            return _flipped(mask_of(condition, depth - 1))
        return None
    return _compared(node, depth)


def _flipped(mask: Mask | None) -> Mask | None:
    return None if mask is None else mask.flipped()


def _compared(node: ir.Node, depth: int) -> Mask | None:
    """mask == 0, mask > 0 and the like; or abs(x) >= the smallest selected magnitude."""
    a, b = node.inputs
    if node.op_type == "Equal":
        for one, other in ((a, b), (b, a)):
            if is_filled_with(other, 0):
                return _flipped(mask_of(one, depth - 1))
            if is_filled_with(other, 1):
                return mask_of(one, depth - 1)
        return None
    if node.op_type == "Greater" and (is_filled_with(b, 0) or is_filled_with(b, 0.5)):
        return mask_of(a, depth - 1)
    relation = node.op_type
    topk = _smallest_selected(b)
    if topk is None:
        topk, a, relation = _smallest_selected(a), b, _MIRRORED[relation]
    if topk is None:
        return None
    selected = selection(topk)
    if magnitude_of(a) is not selected.source:
        raise NoMatch(topk, "what is compared with the k-th magnitude is not the magnitude that TopK ranked")
    if relation in ("Greater", "LessOrEqual"):
        raise NoMatch(topk, "abs(x) > k-th magnitude drops the k-th as well: neither top-k nor threshold")
    return Mask(topk, selected.source, selected.k, relation == "Less", "all")


def _smallest_selected(value: ir.Value | None) -> ir.Node | None:
    """The TopK of which ``value`` is the smallest selected magnitude, [..., 1]: ReduceMin, or the last of the sorted ones."""
    while (node := produced_by(value, "Unsqueeze")) is not None:
        value = node.inputs[0]
    node = produced_by(value, "ReduceMin", "Slice", "Gather")
    if node is None:
        return None
    topk = produced_by(node.inputs[0], "TopK")
    if topk is None or node.inputs[0] is not topk.outputs[0]:
        return None
    if node.op_type == "ReduceMin":
        axes = elements(node.inputs[1]) if len(node.inputs) > 1 else None
        return topk if axes is not None and axes.tolist() in ([-1], [_rank(node.inputs[0]) - 1]) else None
    if topk.attributes.get_int("sorted", 1) != 1:
        raise NoMatch(topk, "the k-th magnitude is taken from values that are not sorted")
    k = selection(topk).k
    operands = [elements(operand) for operand in node.inputs[1:]]
    if node.op_type == "Gather":
        is_last = operands[0] is not None and operands[0].size == 1 and int(operands[0].item()) in (-1, k - 1)
        return topk if is_last and last_axis(node.attributes.get_int("axis", 0), node.inputs[0]) else None
    if len(operands) < 3 or any(operand is None or operand.size != 1 for operand in operands):
        return None
    start, end, axis = (int(operand.item()) for operand in operands[:3] if operand is not None)
    is_last = start in (-1, k - 1) and end >= k and last_axis(axis, node.inputs[0])
    return topk if is_last else None


def _rank(value: ir.Value | None) -> int:
    return len(value.shape) if value is not None and value.shape is not None else 0


def topk_of_indices(value: ir.Value | None) -> ir.Node | None:
    """The TopK whose indices ``value`` are, in whatever integer type."""
    while (cast := produced_by(value, "Cast", "Identity")) is not None:
        value = cast.inputs[0]
    node = produced_by(value, "TopK")
    return node if node is not None and value is node.outputs[1] else None


def _scattered(node: ir.Node) -> Mask | None:
    """zeros.scatter(indices, 1), or ones.scatter(indices, 0)."""
    data, indices, updates = node.inputs
    topk = topk_of_indices(indices)
    if topk is None:
        return None
    if is_filled_with(data, 0) and is_filled_with(updates, 1):
        inverted = False
    elif is_filled_with(data, 1) and is_filled_with(updates, 0):
        inverted = True
    else:
        return None
    selected = check_scatter(node, topk)
    return Mask(topk, selected.source, selected.k, inverted)


def check_scatter(node: ir.Node, topk: ir.Node) -> Mask:
    """What ``topk`` selects, when ``node`` scatters by its indices over rows of the same shape; NoMatch otherwise."""
    selected = selection(topk)
    if node.attributes.get_string("reduction", "none") != "none":
        raise NoMatch(topk, "the scatter adds up or compares instead of replacing")
    if not last_axis(node.attributes.get_int("axis", 0), topk.inputs[0]):
        raise NoMatch(topk, "the scatter is along another axis than the last")
    if not same_shape(node.inputs[0], topk.inputs[0]):
        raise NoMatch(topk, "what is scattered into is not known to have the shape of what was ranked")
    return selected


def _summed_one_hot(node: ir.Node) -> Mask | None:
    """one_hot(indices).sum(-2): OneHot, or its spelling as a comparison with 0, 1, 2, ..."""
    one_hot = node.inputs[0]
    while (cast := produced_by(one_hot, "Cast", "Identity")) is not None:
        one_hot = cast.inputs[0]
    axes = elements(node.inputs[1]) if len(node.inputs) > 1 else None
    if axes is None or axes.size != 1 or node.attributes.get_int("keepdims", 1) != 0:
        return None
    if (made := produced_by(one_hot, "OneHot")) is not None:
        topk = topk_of_indices(made.inputs[0])
        values, depth = elements(made.inputs[2]), elements(made.inputs[1])
        is_plain = values is not None and values.tolist() == [0, 1] and made.attributes.get_int("axis", -1) == -1
        width = None if depth is None else int(depth.item())
    elif (made := produced_by(one_hot, "Equal")) is not None:
        indices, numbers = made.inputs if elements(made.inputs[1]) is not None else made.inputs[::-1]
        unsqueeze, counted = produced_by(indices, "Unsqueeze"), elements(numbers)
        topk = topk_of_indices(unsqueeze.inputs[0]) if unsqueeze is not None else None
        added = elements(unsqueeze.inputs[1]) if unsqueeze is not None else None
        is_plain = added is not None and added.tolist() == [-1] and counted is not None
        is_plain = is_plain and counted is not None and np.array_equal(counted.ravel(), np.arange(counted.size))
        width = None if counted is None else counted.size
    else:
        return None
    if topk is None:
        return None
    selected = selection(topk)
    ranked = topk.inputs[0]
    rank = _rank(ranked)
    if not is_plain or int(axes.item()) not in (-2, rank - 1) or ranked is None or ranked.shape is None:
        raise NoMatch(topk, "its indices become a one-hot form that is not a mask over the row")
    if width != ranked.shape[-1]:
        raise NoMatch(topk, f"the one-hot form has {width} places, the row {ranked.shape[-1]}")
    return Mask(topk, selected.source, selected.k)


def selection(topk: ir.Node) -> Mask:
    """What a TopK node selects: the largest magnitudes of each row of one value; NoMatch says what else it does."""
    ranked, count = topk.inputs
    if topk.attributes.get_int("largest", 1) != 1:
        raise NoMatch(
            topk, "it selects the smallest to drop them, and so keeps the highest index of a tie, not the lowest"
        )
    if not last_axis(topk.attributes.get_int("axis", -1), ranked):
        raise NoMatch(topk, "it is along another axis than the last")
    source = magnitude_of(ranked)
    if source is None:
        node = ranked.producer() if ranked is not None else None
        what = f"the result of {node.op_type}" if node is not None else "an input"
        raise NoMatch(topk, f"it ranks {what}, not the magnitude abs(x)")
    k = elements(count)
    if k is None:
        raise NoMatch(topk, "k is computed when the model runs; expected a constant")
    return Mask(topk, source, int(k.item()))


def magnitude_of(value: ir.Value | None) -> ir.Value | None:
    """x where ``value`` is abs(x), without the casts that lose nothing."""
    node = produced_by(root(value), "Abs")
    return root(node.inputs[0]) if node is not None else None
