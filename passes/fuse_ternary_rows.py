"""Recognises int8 activations as other exporters spell them: q = round(127 / gamma * x), gamma = max(abs(x)) per row.

Every step is a row of integers, the row's x, or a number per row; the latter are tracked as coefficient * gamma^power, so
that ``x * (127 / gamma)``, ``x / (gamma / 127)`` and ``x * (reciprocal(gamma) * 127)`` are the same. They are not the same
bits: they round 127 / gamma * x apart by up to three units in the last place, which moves q where that is almost a half.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import onnx_ir as ir

from qsparse_export.passes.fuse_topk_masks import (
    Mask,
    NoMatch,
    is_filled_with,
    last_axis,
    mask_of,
    produced_by,
    root,
    same_shape,
)
from qsparse_export.passes.static_values import elements, scalar

GAMMA_FLOOR = 1e-5  # of ops.ternary_matmul
_CLOSE = 1e-6
_FLOOR_CLOSE = 2e-3  # 1e-5 in float16
_DEEPEST = 12


class Unlike(Exception):
    """Nearly an int8 quantiser, and not TernaryMatMul's; the message says why."""


@dataclass(frozen=True)
class RowFactor:
    """One number per row: ``coefficient * gamma ** power``, gamma = max(abs(source)) floored; a constant with power 0."""

    coefficient: float
    power: int = 0
    source: ir.Value | None = None

    def times(self, other: RowFactor, sign: int = 1) -> RowFactor | None:
        """The product (or, with sign -1, the quotient); None when the two belong to different rows."""
        if self.source is not None and other.source is not None and self.source is not other.source:
            return None
        if sign < 0 and other.coefficient == 0:
            return None
        coefficient = self.coefficient * other.coefficient if sign > 0 else self.coefficient / other.coefficient
        return RowFactor(coefficient, self.power + sign * other.power, self.source or other.source)


@dataclass(frozen=True)
class QuantisedRow:
    """A value that is ``factor * q`` where ``q = round(scaled)``, and 0 where ``mask`` is not."""

    x: ir.Value
    scaled: ir.Value
    q: ir.Value
    factor: RowFactor
    mask: RowMask | None = None


@dataclass(frozen=True)
class RowMask:
    """The mask of a quantised row: ``masked`` is ``kept`` with 0 where ``mask`` is not."""

    mask: Mask
    kept: ir.Value
    masked: ir.Value


def row_factor(value: ir.Value | None, depth: int = _DEEPEST) -> RowFactor | None:
    """What number per row ``value`` is, None when it is something else; Unlike when its gamma is another one."""
    value = root(value)
    if value is None or depth == 0:
        return None
    number = scalar(value)
    if number is not None:
        return RowFactor(number) if math.isfinite(number) else None
    node = produced_by(value, "Mul", "Div", "Reciprocal", "Clip", "Max", "ReduceMax", "Unsqueeze")
    if node is None:
        return None
    if node.op_type in ("Mul", "Div"):
        a = row_factor(node.inputs[0], depth - 1)
        b = row_factor(node.inputs[1], depth - 1) if a is not None else None
        return a.times(b, 1 if node.op_type == "Mul" else -1) if a is not None and b is not None else None
    if node.op_type == "Reciprocal":
        inner = row_factor(node.inputs[0], depth - 1)
        return RowFactor(1.0).times(inner, -1) if inner is not None else None
    return _gamma(node)


def _gamma(node: ir.Node) -> RowFactor | None:
    floor = 0.0
    if node.op_type in ("Clip", "Max"):
        a, b = node.inputs[0], node.inputs[1] if len(node.inputs) > 1 else None
        if node.op_type == "Clip" and any(bound is not None for bound in node.inputs[2:]):
            return None
        known = scalar(b)
        if known is None and node.op_type == "Max":
            a, known = b, scalar(a)
        maximum = produced_by(a, "ReduceMax", "Unsqueeze")
        if maximum is None or known is None:
            return None
        node, floor = maximum, known
    source = _row_maximum(node)
    if source is None:
        return None
    if abs(floor - GAMMA_FLOOR) > _FLOOR_CLOSE * GAMMA_FLOOR:
        came = f"floored at {floor:.3g}" if floor else "not floored"
        raise Unlike(f"max(abs(x)) is {came}; TernaryMatMul floors it at {GAMMA_FLOOR:.0e}")
    return RowFactor(1.0, 1, source)


def _row_maximum(node: ir.Node) -> ir.Value | None:
    """x where ``node`` is the maximum of abs(x) per row, [..., 1]."""
    keeps = 1
    if node.op_type == "Unsqueeze":
        axis = elements(node.inputs[1])
        inner = produced_by(node.inputs[0], "ReduceMax")
        if axis is None or axis.tolist() != [-1] or inner is None:
            return None
        node, keeps = inner, 0
    axes = elements(node.inputs[1]) if len(node.inputs) > 1 else None
    absolute = produced_by(root(node.inputs[0]), "Abs")
    if absolute is None or axes is None or axes.size != 1 or node.attributes.get_int("keepdims", 1) != keeps:
        return None
    return root(absolute.inputs[0]) if last_axis(int(axes.item()), node.inputs[0]) else None


def quantised_row(value: ir.Value | None, depth: int = _DEEPEST) -> QuantisedRow | None:
    """The int8 quantiser behind ``value``, None when there is none; Unlike or NoMatch when it is another one."""
    node = value.producer() if value is not None else None
    if node is None or node.domain != "" or depth == 0 or value is None:
        return None
    if node.op_type in ("Cast", "Identity"):
        return quantised_row(node.inputs[0], depth - 1)
    if node.op_type in ("Mul", "Div"):
        return _scaled_or_masked(node, depth)
    if node.op_type == "Where" and is_filled_with(node.inputs[2], 0) and (mask := mask_of(node.inputs[0])) is not None:
        return _masked(quantised_row(node.inputs[1], depth - 1), mask, node.inputs[1], value)
    if node.op_type == "Add":
        return _straight_through(node, depth)
    return _rounded(value)


def _scaled_or_masked(node: ir.Node, depth: int) -> QuantisedRow | None:
    a, b = node.inputs
    for inner, other in ((a, b), (b, a)) if node.op_type == "Mul" else ((a, b),):
        row = quantised_row(inner, depth - 1)
        if row is None:
            continue
        if node.op_type == "Mul" and (mask := mask_of(other)) is not None:
            return _masked(row, mask, inner, node.outputs[0])
        factor = row_factor(other)
        product = row.factor.times(factor, 1 if node.op_type == "Mul" else -1) if factor is not None else None
        return replace(row, factor=product) if product is not None else None
    return None


def _masked(row: QuantisedRow | None, mask: Mask, kept: ir.Value | None, masked: ir.Value) -> QuantisedRow | None:
    if row is None or kept is None:
        return None
    if mask.source is not root(row.x):
        raise NoMatch(mask.topk, "the mask of the quantised row comes from other magnitudes than abs(x)")
    if mask.inverted or mask.ties == "all" or row.mask is not None:
        raise NoMatch(mask.topk, "the mask of the quantised row is not the k largest abs(x), lowest index first")
    if not same_shape(masked, row.x):
        raise NoMatch(mask.topk, "the mask of the quantised row is not known to have its shape")
    return replace(row, mask=RowMask(mask, kept, masked))


def _straight_through(node: ir.Node, depth: int) -> QuantisedRow | None:
    """x + (dequantised - x), which is the dequantised row up to rounding."""
    for x, difference in (node.inputs, node.inputs[::-1]):
        sub = produced_by(difference, "Sub")
        if sub is not None and x is not None and sub.inputs[1] is x:
            row = quantised_row(sub.inputs[0], depth - 1)
            if row is not None and root(x) is root(row.x):
                return row
    return None


def _rounded(value: ir.Value) -> QuantisedRow | None:
    """Round with a Clip (or Max and Min) before or behind it, or without: 127 / gamma * x is never beyond 127."""
    inside = value
    rounds = 0
    scaled: ir.Value | None = None
    while (node := produced_by(inside, "Clip", "Min", "Max", "Round")) is not None and rounds < 2:
        if node.op_type == "Round":
            rounds += 1
        elif not _keeps_int8(node):
            return None
        operand = (
            node.inputs[0] if node.op_type in ("Clip", "Round") or scalar(node.inputs[0]) is None else node.inputs[1]
        )
        if operand is None:
            return None
        inside = operand
        scaled = inside if rounds else None
    if rounds != 1 or scaled is None:
        return None
    scaling = produced_by(scaled, "Mul", "Div")
    if scaling is None:
        return None
    a, b = scaling.inputs
    for x, other in ((a, b), (b, a)) if scaling.op_type == "Mul" else ((a, b),):
        factor = row_factor(other)
        if x is None or factor is None or factor.source is None:
            continue
        if scaling.op_type == "Div":
            factor = RowFactor(1.0).times(factor, -1)
        if factor is None or factor.power != -1 or abs(factor.coefficient / 127 - 1) > _CLOSE:
            raise Unlike("x is not scaled by 127 / max(abs(x)) before it is rounded")
        if factor.source is None or not _is_row_of(factor.source, x):
            raise Unlike("the maximum is of another value than the one that is rounded")
        return QuantisedRow(x, scaled, value, RowFactor(1.0, 0, factor.source))
    return None


def _keeps_int8(node: ir.Node) -> bool:
    """Whether bounds leave -127..127 alone."""
    if node.op_type == "Clip":
        low, high = (scalar(bound) if bound is not None else None for bound in (*node.inputs[1:], None, None)[:2])
        unbounded = [bound is None for bound in (*node.inputs[1:], None, None)[:2]]
        return (unbounded[0] or (low is not None and low <= -127)) and (
            unbounded[1] or (high is not None and high >= 127)
        )
    bounds = [number for number in map(scalar, node.inputs) if number is not None]
    if len(bounds) != 1 or len(node.inputs) != 2:
        return False
    return bounds[0] <= -127 if node.op_type == "Max" else bounds[0] >= 127


def _is_row_of(source: ir.Value, x: ir.Value) -> bool:
    """Whether max(abs(source)) is max(abs(x)): the same value, or x is its top k, which holds the largest of all."""
    origin = root(x)
    if origin is source:
        return True
    mask = origin.producer() if origin is not None else None
    if mask is None or (mask.domain, mask.op_type) != ("ai.qsparse", "TopKSparsify"):
        return False
    plain = mask.attributes["rescale"].as_string() == "none" and mask.attributes["k"].as_int() > 0
    return plain and root(mask.inputs[0]) is source
