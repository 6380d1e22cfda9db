"""What the fuse-sparse passes share: a top-k mask and the matrices behind it become one node with one long row per channel.

Before::

    h = TopKSparsify<k, block, rescale>(x)
    q = Product(h, wq); v = Product(h, wv)

After::

    y = Joined<k, block, rescale, n=[4, 2]>(x, "wq+wv")
    q, v = Split<axis=-1>(y, [4, 2])

Without a mask ``k`` is the width. No weight is read: the joined ones are lazy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import onnx_ir as ir

from qsparse_export.passes.annotate_scope import SCOPE
from qsparse_export.passes.original_choices import choices_of, join_choices

DOMAIN = "ai.qsparse"
MOST_MATRICES = 64  # QSK_MOST_MATRICES of the kernel library


@dataclass(frozen=True)
class Family:
    """One kind of product and the op that joins several.

    ``why_not`` says why a node is not such a product of constant matrices, or "" when it is; ``operands`` are its inputs
    that are joined, with the axis along which they are; ``outputs`` tells the width of its result; ``attributes`` are
    written on the joined node, beside those of the mask and ``n``, and must be equal for all. A product that
    ``joins_alone`` is worth joining with others on an unmasked value; ``is_choice`` says that the verifier follows it.
    """

    domain: str
    product: str
    joined: str
    operands: tuple[tuple[int, int], ...]
    why_not: Callable[[ir.Node], str]
    outputs: Callable[[ir.Node], int]
    attributes: Callable[[ir.Node], dict[str, int]]
    joins_alone: bool
    is_choice: bool

    def holds(self, node: ir.Node | None) -> bool:
        """Whether ``node`` is such a product, constant or not."""
        return node is not None and node.domain == self.domain and node.op_type == self.product


@dataclass(frozen=True)
class Match:
    """``mask`` is TopKSparsify, or None; ``products`` are in the order of the graph."""

    mask: ir.Node | None
    products: tuple[ir.Node, ...]

    @property
    def x(self) -> ir.Value:
        """What is masked and multiplied."""
        x = (self.mask or self.products[0]).inputs[0]
        assert x is not None
        return x


def join_all(graph: ir.Graph, family: Family) -> bool:
    """Joins wherever ``family`` matches; True when it did anywhere."""
    modified = False
    for value in _shared_inputs(graph, family):
        match = find(graph, value, family)
        if isinstance(match, Match):
            _rewrite(graph, match, family)
            modified = True
    return modified


def explain(graph: ir.Graph, value: ir.Value, family: Family) -> str:
    """Why what reads ``value`` is not joined, or "" where it is."""
    match = find(graph, value, family)
    return match if isinstance(match, str) else ""


def _is_mask(node: ir.Node | None) -> bool:
    return node is not None and node.domain == DOMAIN and node.op_type == "TopKSparsify"


def _shared_inputs(graph: ir.Graph, family: Family) -> list[ir.Value]:
    inputs = (node.inputs[0] for node in graph if family.holds(node))
    return list({id(value): value for value in inputs if value is not None}.values())


def find(graph: ir.Graph, value: ir.Value, family: Family) -> Match | str:
    """The products on ``value`` and the mask that makes it, or why they are not joined."""
    readers = [use.node for use in value.uses()]
    products = tuple(node for node in graph if family.holds(node) and node.inputs[0] is value)
    producer = value.producer()
    mask = producer if _is_mask(producer) else None
    if mask is not None and (mask.graph is not graph or len(readers) != len(products) or value.is_graph_output()):
        return "something else reads the masked value"
    if mask is not None and _keeps_everything(mask, value):
        return "the mask keeps every channel: another pass may drop it"
    if mask is None and (len(products) < 2 or not family.joins_alone):
        return "no mask: nothing to share"
    if len(products) > MOST_MATRICES:
        return f"{len(products)} matrices, and the kernel takes {MOST_MATRICES}"
    for node in products:
        for position, _ in family.operands:
            operand = node.inputs[position]
            if operand is None or operand.const_value is None or not operand.is_initializer():
                return "the weights are not initialisers of this graph"
            if len(operand.uses()) != 1:
                return f"{operand.name} is read elsewhere too, and joining it would store it twice"
        if reason := family.why_not(node):
            return reason
        if family.attributes(node) != family.attributes(products[0]):
            return "the matrices are stored in different ways"
    # The verifier follows the custom ops in the order of PyTorch's calls: a node stands for calls in a row only.
    ours = [node for node in graph if node.domain == DOMAIN]
    members = [*([mask] if mask is not None else []), *(products if family.is_choice else ())]
    positions = [ours.index(node) for node in members]
    if any(after != before + 1 for before, after in pairwise(positions)):
        return "another custom op is called in between"
    return Match(mask, products)


def _keeps_everything(mask: ir.Node, value: ir.Value) -> bool:
    width = value.shape[-1] if value.shape is not None else None
    k, block, rescale = _selection(mask)
    return rescale == "none" and k == (block or width)


def _rewrite(graph: ir.Graph, match: Match, family: Family) -> None:
    first = match.products[0]
    sizes = [family.outputs(node) for node in match.products]
    operands = [[_initializer(node, position) for node in match.products] for position, _ in family.operands]
    joined = [_joined(graph, values, axis) for values, (_, axis) in zip(operands, family.operands, strict=True)]
    weights = joined[0]
    width = weights.shape[0] if weights.shape is not None else None
    assert isinstance(width, int)
    selection = (width, 0, "none") if match.mask is None else _selection(match.mask)
    results = [node.outputs[0] for node in match.products]
    scope = dict((match.mask or first).metadata_props)
    attributes: dict[str, Any] = {"k": selection[0], "block": selection[1], "rescale": selection[2], "n": sizes}
    fused = ir.node(
        family.joined,
        [match.x, *joined],
        attributes=attributes | family.attributes(first),
        domain=DOMAIN,
        metadata_props={SCOPE: scope[SCOPE]} if SCOPE in scope else None,
    )
    members = (*([match.mask] if match.mask is not None else []), *match.products)
    join_choices(fused, [choice for member in members for choice in choices_of(member)])
    nodes, outputs = [fused], list(fused.outputs)
    if len(results) > 1:
        y = fused.outputs[0]
        y.name = "+".join(str(result.name) for result in results)
        y.type = results[0].type
        if results[0].shape is not None:
            y.shape = ir.Shape([*results[0].shape[:-1], sum(sizes)])
        split_sizes = _new_initializer(graph, f"{y.name}.sizes", ir.tensor(np.array(sizes, np.int64)))
        split = ir.node(
            "Split",
            [y, split_sizes],
            attributes={"axis": -1},
            num_outputs=len(results),
            metadata_props={SCOPE: scope[SCOPE]} if SCOPE in scope else None,
        )
        nodes, outputs = [fused, split], list(split.outputs)
    graph.insert_before(match.mask or first, nodes)  # where PyTorch masks: the order of the masks stays
    for old, new in zip(results, outputs, strict=True):
        new.type, new.shape, new.name = old.type, old.shape, old.name
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove([*match.products, *([match.mask] if match.mask is not None else [])], safe=True)
    for initializer in (value for values in operands for value in values):
        if not initializer.uses() and initializer.name is not None:
            graph.initializers.pop(initializer.name, None)


def _selection(mask: ir.Node) -> tuple[int, int, str]:
    attributes = mask.attributes
    return attributes["k"].as_int(), attributes["block"].as_int(), attributes["rescale"].as_string()


def _initializer(node: ir.Node, position: int) -> ir.Value:
    value = node.inputs[position]
    assert value is not None
    return value


def _joined(graph: ir.Graph, values: Sequence[ir.Value], axis: int) -> ir.Value:
    """One initialiser of all ``values`` side by side, read when the file is written; the only one as it is."""
    if len(values) == 1:
        return values[0]
    tensors = [value.const_value for value in values]
    shapes = [tensor.shape.numpy() for tensor in tensors if tensor is not None]
    shape = list(shapes[0])
    shape[axis] = sum(other[axis] for other in shapes)
    name = _joined_name([str(value.name) for value in values])

    def read() -> ir.TensorProtocol:
        parts = [tensor.numpy() for tensor in tensors if tensor is not None]
        return ir.Tensor(np.ascontiguousarray(np.concatenate(parts, axis=axis)), name=name)

    assert tensors[0] is not None
    lazy = ir.LazyTensor(read, dtype=tensors[0].dtype, shape=ir.Shape(shape), cache=False, name=name)
    return _new_initializer(graph, name, lazy)


def _new_initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.Value(
        name=name, const_value=tensor, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype)
    )
    graph.register_initializer(value)
    return value


def _joined_name(names: Sequence[str]) -> str:
    """``a.q_proj.packed, a.k_proj.packed`` to ``a.q_proj+k_proj.packed``; otherwise all names with + between them."""
    parts = [name.split(".") for name in names]
    differing = [i for i in range(len(parts[0])) if len({tuple(part[i : i + 1]) for part in parts}) > 1]
    if len({len(part) for part in parts}) > 1 or len(differing) != 1:
        return "+".join(names)
    at = differing[0]
    return ".".join([*parts[0][:at], "+".join(part[at] for part in parts), *parts[0][at + 1 :]])
