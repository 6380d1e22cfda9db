"""Fuses a top-k mask and the ternary matrices behind it into one node with one long row of weights per channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qsparse_export.passes.annotate_scope import SCOPE
from qsparse_export.passes.base import Pass, PassResult
from qsparse_export.passes.original_choices import choices_of, join_choices

DOMAIN = "ai.qsparse"
MOST_MATRICES = 64  # QSK_MOST_MATRICES of the kernel library


@dataclass(frozen=True)
class FuseSparseTernary(Pass):
    """Makes ``SparseTernaryMatMul`` of TopKSparsify and TernaryMatMul, or of several TernaryMatMul on one value.

    Before::

        h = TopKSparsify<k, block, rescale>(x)
        q = TernaryMatMul<n=4>(h, wq, sq); v = TernaryMatMul<n=2>(h, wv, sv)

    After::

        y = SparseTernaryMatMul<k, block, rescale, n=[4, 2]>(x, "wq+wv", "sq+sv")
        q, v = Split<axis=-1>(y, [4, 2])

    Without a mask ``k`` is the width: natural zeros alone are skipped. No weight is read: the joined ones are lazy.
    """

    name: ClassVar[str] = "fuse-sparse-ternary"

    def call(self, model: ir.Model) -> PassResult:
        """See :class:`Pass`."""
        modified = False
        for value in _shared_inputs(model.graph):
            match = _match(model.graph, value)
            if isinstance(match, _Match):
                _rewrite(model.graph, match)
                modified = True
        return PassResult(model, modified)


@dataclass(frozen=True)
class _Match:
    """``mask`` is TopKSparsify, or None; the nodes of ``products`` are TernaryMatMul in the order of the graph."""

    mask: ir.Node | None
    products: tuple[ir.Node, ...]

    @property
    def x(self) -> ir.Value:
        x = (self.mask or self.products[0]).inputs[0]
        assert x is not None
        return x


def explain(graph: ir.Graph, value: ir.Value) -> str:
    """Why what reads ``value`` is not fused, or "" where it is."""
    match = _match(graph, value)
    return match if isinstance(match, str) else ""


def _is(node: ir.Node | None, op_type: str) -> bool:
    return node is not None and node.domain == DOMAIN and node.op_type == op_type


def _shared_inputs(graph: ir.Graph) -> list[ir.Value]:
    inputs = (node.inputs[0] for node in graph if _is(node, "TernaryMatMul"))
    return list({id(value): value for value in inputs if value is not None}.values())


def _match(graph: ir.Graph, value: ir.Value) -> _Match | str:
    readers = [use.node for use in value.uses()]
    products = tuple(node for node in graph if _is(node, "TernaryMatMul") and node.inputs[0] is value)
    producer = value.producer()
    mask = producer if _is(producer, "TopKSparsify") else None
    if mask is not None and (mask.graph is not graph or len(readers) != len(products) or value.is_graph_output()):
        return "something else reads the masked value"
    if mask is not None and _keeps_everything(mask, value):
        return "the mask keeps every channel: another pass may drop it"
    if mask is None and len(products) < 2:
        return "one matrix without a mask: nothing to share"
    if len(products) > MOST_MATRICES:
        return f"{len(products)} matrices, and the kernel takes {MOST_MATRICES}"
    for node in products:
        for operand in node.inputs[1:]:
            if operand is None or operand.const_value is None or not operand.is_initializer():
                return "the weights are not initialisers of this graph"
            if len(operand.uses()) != 1:
                return f"{operand.name} is read elsewhere too, and joining it would store it twice"
    # The verifier follows the custom ops in the order of PyTorch's calls: a node stands for calls in a row only.
    ours = [node for node in graph if node.domain == DOMAIN]
    members = [*([mask] if mask is not None else []), *products]
    positions = [ours.index(node) for node in members]
    if any(after != before + 1 for before, after in pairwise(positions)):
        return "another custom op is called in between"
    return _Match(mask, products)


def _keeps_everything(mask: ir.Node, value: ir.Value) -> bool:
    width = value.shape[-1] if value.shape is not None else None
    k, block, rescale = _selection(mask)
    return rescale == "none" and k == (block or width)


def _rewrite(graph: ir.Graph, match: _Match) -> None:
    first = match.products[0]
    sizes = [node.attributes["n"].as_int() for node in match.products]
    weights, scales = ([_initializer(node, i) for node in match.products] for i in (1, 2))
    joined_weights, joined_scales = _joined(graph, weights, axis=1), _joined(graph, scales, axis=0)
    width = joined_weights.shape[0] if joined_weights.shape is not None else None
    assert isinstance(width, int)
    selection = (width, 0, "none") if match.mask is None else _selection(match.mask)
    results = [node.outputs[0] for node in match.products]
    scope = dict((match.mask or first).metadata_props)
    fused = ir.node(
        "SparseTernaryMatMul",
        [match.x, joined_weights, joined_scales],
        attributes={"k": selection[0], "block": selection[1], "rescale": selection[2], "n": sizes},
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
    graph.insert_before(first, nodes)
    for old, new in zip(results, outputs, strict=True):
        new.type, new.shape, new.name = old.type, old.shape, old.name
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove([*match.products, *([match.mask] if match.mask is not None else [])], safe=True)
    for initializer in (*weights, *scales):
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
