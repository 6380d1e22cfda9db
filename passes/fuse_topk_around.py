"""What other exporters leave around a TopKSparsify node: straight-through sums, blocks as reshapes, the L2 rescale."""

from __future__ import annotations

from typing import Literal

import onnx_ir as ir

from qsparse_export.passes.annotate_scope import SCOPE
from qsparse_export.passes.fuse_topk_masks import produced_by, same_shape
from qsparse_export.passes.original_choices import choices_of, join_choices
from qsparse_export.passes.static_values import elements

DOMAIN = "ai.qsparse"
NORM_FLOOR = 1e-12  # of ops.topk_sparsify, and of torch.nn.functional.normalize
_DEEPEST_SUM = 3


def new_mask(x: ir.Value, k: int, block: int, rescale: Literal["none", "l2"], node: ir.Node) -> ir.Node:
    """A TopKSparsify node on ``x``, of the PyTorch module that ``node`` belongs to."""
    fused = ir.node(
        "TopKSparsify",
        [x],
        attributes={"k": k, "block": block, "rescale": rescale},
        domain=DOMAIN,
        metadata_props={SCOPE: node.metadata_props[SCOPE]} if SCOPE in node.metadata_props else None,
    )
    fused.outputs[0].type, fused.outputs[0].shape = x.type, x.shape
    return fused


def replace(old: ir.Value, new: ir.Value) -> None:
    """Whatever reads ``old``, or is it as a graph output, reads ``new``, which takes the name over."""
    name, old.name = old.name, f"{old.name}.replaced"
    new.name = name  # the graph would call it by a name that may stand for something else in the original
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def simplified(graph: ir.Graph | ir.Function) -> bool:
    """Takes in what surrounds the TopKSparsify nodes of ``graph``; True when there was anything."""
    modified = False
    for node in list(graph):
        same: ir.Value | None = None
        if _is_mask(node):
            same = _masked_before(node)
        elif node.domain == "" and node.op_type in ("Add", "Sub"):
            same = _straight_through(node)
        if same is not None:
            put_value(node.outputs[0], same)
            modified = True
        elif node.domain != "":
            continue
        elif node.op_type == "Reshape" and (mask := _blocks(node)) is not None:
            _put(node, mask, _before_reshape(mask.inputs[0]), block=_width(mask.inputs[0]))
            modified = True
        elif node.op_type == "Div" and (mask := _rescaled(node)) is not None:
            _put(node, mask, mask.inputs[0], rescale="l2")
            modified = True
    return modified


def _is_mask(node: ir.Node | None) -> bool:
    return node is not None and node.domain == DOMAIN and node.op_type == "TopKSparsify"


def _put(
    node: ir.Node, mask: ir.Node, x: ir.Value | None, *, block: int | None = None, rescale: Literal["l2"] | None = None
) -> None:
    """One TopKSparsify in the place of ``mask`` and of ``node``, which is all that reads it."""
    attributes = mask.attributes
    assert x is not None and node.graph is not None
    if block is not None and block == _width(x):
        block = 0
    fused = new_mask(
        x,
        attributes["k"].as_int(),
        attributes["block"].as_int() if block is None else block,
        rescale or "none",
        mask,
    )
    join_choices(fused, choices_of(mask))
    node.graph.insert_before(node, fused)
    replace(node.outputs[0], fused.outputs[0])


def put_value(old: ir.Value, same: ir.Value) -> None:
    """``same`` in the place of ``old``, which has the same elements; only one of them may be a graph output."""
    if old.is_graph_output():
        replace(old, same)
    else:
        old.replace_all_uses_with(same)


def _masked_before(node: ir.Node) -> ir.Value | None:
    """The input of a mask that keeps all that an earlier one kept: a layer that masks its input in place, then the next."""
    value = node.inputs[0]
    before = value.producer() if value is not None else None
    if before is None or not _is_mask(before):
        return None
    first, second = before.attributes, node.attributes
    same = all(first[name].value == second[name].value for name in ("block", "rescale"))
    both_outputs = value is not None and value.is_graph_output() and node.outputs[0].is_graph_output()
    keeps_all = first["k"].as_int() <= second["k"].as_int() and first["rescale"].as_string() == "none"
    return value if same and keeps_all and not both_outputs else None


def _width(value: ir.Value | None) -> int | None:
    dim = value.shape[-1] if value is not None and value.shape is not None and len(value.shape) else None
    return dim if isinstance(dim, int) else None


def _straight_through(node: ir.Node) -> ir.Value | None:
    """s where ``node`` ends a sum of s = TopKSparsify(x) and x that equals s for every finite x: (s - x) + x and the like.

    In each place s is 0 or x, so every step of such a sum is a small multiple of x, which floats hold exactly.
    """
    for masked in _masks_within(node, _DEEPEST_SUM):
        producer = masked.producer()
        x = producer.inputs[0] if producer is not None else None
        same = all(_multiple(node.outputs[0], masked, x, is_kept, _DEEPEST_SUM) == is_kept for is_kept in (0, 1))
        if same and not (masked.is_graph_output() and node.outputs[0].is_graph_output()):
            return masked
    return None


def _masks_within(node: ir.Node, depth: int) -> list[ir.Value]:
    found = []
    for value in node.inputs:
        producer = value.producer() if value is not None else None
        if value is None or producer is None:
            continue
        if _is_mask(producer) and producer.attributes["rescale"].as_string() == "none":
            found.append(value)
        elif depth > 1 and producer.domain == "" and producer.op_type in ("Add", "Sub"):
            found.extend(_masks_within(producer, depth - 1))
    return found


def _multiple(value: ir.Value | None, masked: ir.Value, x: ir.Value | None, is_kept: int, depth: int) -> int | None:
    """How many times x ``value`` is where the mask is ``is_kept``; None when that is not known, or no longer exact."""
    if value is masked:
        return is_kept
    if value is x:
        return 1
    node = produced_by(value, "Add", "Sub")
    if node is None or depth == 0:
        return None
    a, b = (_multiple(operand, masked, x, is_kept, depth - 1) for operand in node.inputs)
    if a is None or b is None:
        return None
    total = a + b if node.op_type == "Add" else a - b
    return total if abs(total) <= 2 else None


def _before_reshape(value: ir.Value | None) -> ir.Value:
    """What a Reshape in front of ``value`` read."""
    node = produced_by(value, "Reshape")
    assert node is not None and node.inputs[0] is not None
    return node.inputs[0]


def _blocks(node: ir.Node) -> ir.Node | None:
    """The mask of x.reshape(..., block) that ``node`` puts back into the shape of x."""
    mask = node.inputs[0].producer() if node.inputs[0] is not None else None
    if mask is None or not _is_mask(mask) or len(mask.outputs[0].uses()) != 1 or mask.outputs[0].is_graph_output():
        return None
    into = produced_by(mask.inputs[0], "Reshape")
    x = into.inputs[0] if into is not None else None
    width, block = _width(x), _width(mask.inputs[0])
    plain = mask.attributes["block"].as_int() == 0 and mask.attributes["rescale"].as_string() == "none"
    # Rows lie one after the other, so blocks of a divisor of the width never reach over the end of a row.
    fits = width is not None and block is not None and block > 0 and width % block == 0
    return mask if plain and fits and same_shape(node.outputs[0], x) else None


def _rescaled(node: ir.Node) -> ir.Node | None:
    """The mask whose rows ``node`` divides by max(their L2 norm, 1e-12), as torch.nn.functional.normalize does."""
    masked, divisor = node.inputs
    mask = masked.producer() if masked is not None else None
    if mask is None or masked is None or not _is_mask(mask) or mask.attributes["rescale"].as_string() != "none":
        return None
    if (expand := produced_by(divisor, "Expand")) is not None:
        divisor = expand.inputs[0]
    floored = produced_by(divisor, "Max", "Clip")
    if floored is None or len(floored.inputs) < 2:
        return None
    norm = produced_by(floored.inputs[0], "ReduceL2")
    floor = elements(floored.inputs[1])
    if norm is None or norm.inputs[0] is not masked or floor is None or floor.size != 1:
        return None
    if floored.op_type == "Clip" and any(bound is not None for bound in floored.inputs[2:]):
        return None
    axes = elements(norm.inputs[1]) if len(norm.inputs) > 1 else None
    rank = len(masked.shape) if masked.shape is not None else 0
    along_rows = (
        axes is not None and axes.tolist() in ([-1], [rank - 1]) and norm.attributes.get_int("keepdims", 1) == 1
    )
    readers = {use.node for use in masked.uses()} - {node, norm}
    only_shapes = all(reader.domain == "" and reader.op_type == "Shape" for reader in readers)
    exact_floor = abs(float(floor.item()) / NORM_FLOOR - 1) < 1e-6
    return mask if along_rows and only_shapes and exact_floor and not masked.is_graph_output() else None
