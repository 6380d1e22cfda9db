"""Fuses top-k masking as other exporters spell it, in standard ops, into TopKSparsify."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qsparse_export.ops.base import DOMAIN, VERSION
from qsparse_export.passes.base import Pass, PassResult
from qsparse_export.passes.fuse_topk_around import new_mask, put_value, replace, simplified
from qsparse_export.passes.fuse_topk_masks import (
    Mask,
    NoMatch,
    check_scatter,
    is_filled_with,
    mask_of,
    produced_by,
    root,
    same_shape,
    selection,
    topk_of_indices,
)
from qsparse_export.passes.original_choices import MaskChoice, add_choice

_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


@dataclass(frozen=True)
class FuseTopK(Pass):
    """Makes ``TopKSparsify`` of a TopK of magnitudes and what applies its mask.

    Before::

        values, i = TopK(Abs(x), [k]); m = Cast(ScatterElements(false, i, true)); s = Mul(x, m); y = Add(Sub(s, x), x)

    After::

        y = TopKSparsify<k, block=0, rescale="none">(x)

    That is the official Q-Sparse code's spelling. Also: ones or values scattered, Where, negated masks, masks of one-hot
    rows, blocks as reshapes, torch's normalize behind the mask, and any of these in float32 between casts. Equal for every
    finite x; where a mask is multiplied, a dropped infinity gave NaN and now gives 0.
    """

    name: ClassVar[str] = "fuse-topk"

    def call(self, model: ir.Model) -> PassResult:
        """See :class:`Pass`."""
        modified = False
        for graph in (model.graph, *model.graph.subgraphs()):
            for node in list(graph):
                if (match := _match_or_none(node)) is not None:
                    _rewrite(node, match)
                    modified = True
            modified |= simplified(graph)
        if modified:
            model.opset_imports[DOMAIN] = VERSION
            RemoveUnusedNodesPass()(model)
        return PassResult(model, modified)


@dataclass(frozen=True)
class _Match:
    """``y`` is ``x`` where ``mask`` is true and 0 elsewhere."""

    x: ir.Value
    mask: Mask


def explain(graph: ir.Graph) -> dict[str, str]:
    """For every TopK of ``graph``, by its name, why it was not fused."""
    reasons: dict[str, str] = {}
    for node in graph:
        try:
            _match(node)
        except NoMatch as why:
            reasons.setdefault(_called(why.topk), str(why))
    for node in graph:
        if node.domain == "" and node.op_type == "TopK":
            reasons.setdefault(_called(node), "nothing multiplies or selects the ranked value by its result")
    return reasons


def _called(node: ir.Node) -> str:
    return node.name or str(node.outputs[1].name)


def _match_or_none(node: ir.Node) -> _Match | None:
    try:
        return _match(node)
    except NoMatch:
        return None


def _match(node: ir.Node) -> _Match | None:
    if node.domain != "":
        return None
    if node.op_type == "Mul":
        return _multiplied(node)
    if node.op_type == "Where":
        return _selected(node)
    if node.op_type == "ScatterElements":
        return _scattered_values(node)
    return None


def _multiplied(node: ir.Node) -> _Match | None:
    a, b = node.inputs
    for x, candidate in ((a, b), (b, a)):
        mask = mask_of(candidate)
        if mask is not None:
            return _checked(x, mask, node)
    return None


def _selected(node: ir.Node) -> _Match | None:
    condition, yes, no = node.inputs
    mask = mask_of(condition)
    if mask is None:
        return None
    if is_filled_with(no, 0):
        return _checked(yes, mask, node)
    if is_filled_with(yes, 0):
        return _checked(no, mask.flipped(), node)
    return None


def _scattered_values(node: ir.Node) -> _Match | None:
    data, indices, updates = node.inputs
    topk = topk_of_indices(indices)
    gather = produced_by(updates, "GatherElements")
    if topk is not None and is_filled_with(updates, 0) and not is_filled_with(data, 1):
        selection(topk)  # says so when it selects the smallest to drop them
        raise NoMatch(topk, "it drops the largest magnitudes and keeps the rest")
    if topk is None or gather is None or not is_filled_with(data, 0):
        return None
    if topk_of_indices(gather.inputs[1]) is not topk or gather.attributes.get_int("axis", 0) != node.attributes.get_int(
        "axis", 0
    ):
        raise NoMatch(topk, "values are gathered from other places than they are scattered to")
    selected = check_scatter(node, topk)
    return _checked(gather.inputs[0], selected, node)


def _checked(x: ir.Value | None, mask: Mask, node: ir.Node) -> _Match:
    if x is None or root(x) is not mask.source:
        raise NoMatch(mask.topk, "the mask is applied to another value than the one whose magnitudes were ranked")
    if mask.inverted:
        raise NoMatch(mask.topk, "it drops the largest magnitudes and keeps the rest")
    if mask.ties == "all":
        raise NoMatch(mask.topk, "abs(x) >= k-th magnitude keeps every tie: a threshold, another op than top-k")
    if x.dtype not in _TYPES:
        raise NoMatch(mask.topk, f"x is {x.dtype.name if x.dtype else 'of unknown type'}; expected FLOAT or FLOAT16")
    if not same_shape(node.outputs[0], x):
        raise NoMatch(mask.topk, "the mask is not known to have the shape of x")
    width = x.shape[-1] if x.shape is not None else None
    if not isinstance(width, int) or not 0 <= mask.k <= width:
        raise NoMatch(mask.topk, f"k is {mask.k} and the row {width} wide; expected a constant k of 0 to the width")
    return _Match(x, mask)


def _rewrite(node: ir.Node, match: _Match) -> None:
    """Replaces ``node``; in the narrower type where the masked value is only ever cast back to it."""
    y, x = node.outputs[0], match.x
    source = match.mask.source
    casts = [use.node for use in y.uses()]
    only_cast_back = not y.is_graph_output() and all(
        cast.domain == "" and cast.op_type == "Cast" and cast.outputs[0].dtype == source.dtype for cast in casts
    )
    narrow = sorted((cast.outputs[0] for cast in casts), key=lambda value: not value.is_graph_output())
    one_output = sum(value.is_graph_output() for value in narrow) <= 1
    if source is not x and source.dtype in _TYPES and only_cast_back and narrow and one_output:
        results, x = narrow, source
    else:
        results = [y]
    fused = new_mask(x, match.mask.k, 0, "none", node)
    assert node.graph is not None and x.name is not None
    node.graph.insert_before(node, fused)
    add_choice(fused, MaskChoice(x.name, x.name, tuple(str(result.name) for result in results)))
    replace(results[0], fused.outputs[0])
    for result in results[1:]:
        put_value(result, fused.outputs[0])
