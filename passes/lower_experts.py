"""Lowers mixtures of experts to ops that look for no tokens: every expert gets all rows, those of other experts as zeros."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qsparse_export.ops.base import DOMAIN, VERSION
from qsparse_export.passes.annotate_scope import SCOPE
from qsparse_export.passes.base import Pass, PassResult
from qsparse_export.passes.expert_router import match_router, rewrite_router
from qsparse_export.passes.match import STANDARD, is_op, replaced
from qsparse_export.passes.original_choices import ROWS
from qsparse_export.passes.row_wise import Region, rank_of, region_of


@dataclass(frozen=True)
class LowerExperts(Pass):
    """Makes selections of what an expert gathers and scatters, for runtimes without NonZero.

    Before::

        values, chosen = TopK(Softmax(z), [k]); weights = ScatterElements<axis=-1>(0, chosen, values / ReduceSum(values))
        w = weights[:, e]; rows = NonZero(w)                                                   # for each expert e
        y1 = ScatterElements<axis=0, reduction="add">(y0, rows, Expert(Gather(x, rows)) * Gather(w, rows))

    After::

        best = TopKSparsify<k, block=0, rescale="none">(Softmax(z)); weights = best / ReduceSum(best)
        w = weights[:, e]; c = w != 0
        y1 = y0 + Where(c, Expert(Where(c, x, 0)) * w, 0)

    The same results, NaN and infinities included, for an expert that computes each row by itself. What the router gives a row
    of NaN is NaN for every expert instead of k of them. Products skip the weights of a row that is zero where they take rows
    one by one; where they take many at once, every expert takes the time of all tokens. Needs shapes: infer-shapes before.
    """

    name: ClassVar[str] = "lower-experts"

    def call(self, model: ir.Model) -> PassResult:
        """See :class:`Pass`."""
        experts = routers = 0
        for node in list(model.graph):
            expert = _match(node)
            if isinstance(expert, _Expert):
                _rewrite(model.graph, expert)
                experts += 1
            elif (router := match_router(node)) is not None:
                rewrite_router(model.graph, router)
                routers += 1
        if routers:
            model.opset_imports[DOMAIN] = VERSION
        if experts or routers:
            RemoveUnusedNodesPass()(model)
        return PassResult(model, bool(experts or routers))


@dataclass(frozen=True)
class _Expert:
    """``scatter`` adds the result of ``region`` at the rows where ``weight`` [tokens] is not zero."""

    scatter: ir.Node
    weight: ir.Value
    region: Region


def explain(node: ir.Node) -> str:
    """Why the ScatterElements ``node`` is not lowered as an expert, or "" where it is."""
    match = _match(node)
    return match if isinstance(match, str) else ""


def _match(node: ir.Node) -> _Expert | str:
    if not is_op(node, "ScatterElements") or node.attributes.get_string("reduction", "none") != "add":
        return "nothing is added at places"
    data, places, updates = node.inputs
    if node.attributes.get_int("axis", 0) != 0 or data is None or updates is None:
        return "places are not those of axis 0"
    found = _found(_column(places))
    weight = found.inputs[0] if found is not None else None
    if weight is None or rank_of(weight) != 1:
        return "the places are not where the elements of one list are not zero"
    if not _same_width(updates, data):
        return "what is added are not provably whole rows"

    def is_start(start: ir.Node) -> bool:
        taken = is_op(start, "Gather") and start.attributes.get_int("axis", 0) == 0
        return taken and rank_of(start.inputs[1]) == 1 and _found(start.inputs[1]) is found

    if [use.node for use in updates.uses()] != [node] or updates.is_graph_output():
        return f"{updates.name} is read elsewhere too"
    region = region_of(updates, is_start)
    if isinstance(region, str):
        return region
    for value in (data, *(start.inputs[0] for start in region.starts)):
        if value is None or not _same_length(value, weight):
            return f"{value.name if value else 'nothing'} is not known to have as many rows as there are weights"
    return _Expert(node, weight, region)


_KEEPING_ORDER = ("Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
"""Of a tensor with one axis that is not 1 long."""


def _found(value: ir.Value | None) -> ir.Node | None:
    """The NonZero whose result [1, n] ``value`` holds, in order, in whatever shape."""
    while value is not None:
        node = value.producer()
        if is_op(node, "NonZero"):
            return node
        if node is None or node.domain not in STANDARD or node.op_type not in _KEEPING_ORDER:
            return None
        if node.op_type == "Cast" and value.dtype not in (ir.DataType.INT64, ir.DataType.INT32):
            return None
        value = node.inputs[0]
    return None


def _column(places: ir.Value | None) -> ir.Value | None:
    """The numbers of rows [n, 1] that ``places`` [n, width] repeat for each element of a row."""
    node = places.producer() if places is not None else None
    column = node.inputs[0] if is_op(node, "Expand") else None
    shape = column.shape if column is not None else None
    return column if shape is not None and len(shape) == 2 and shape[1] == 1 else None


def _same_width(updates: ir.Value, data: ir.Value) -> bool:
    """Whether both are [.., width]. ONNX wants the places of a scatter in the shape of the updates."""
    if updates.shape is None or data.shape is None or len(updates.shape) != 2 or len(data.shape) != 2:
        return False
    return isinstance(data.shape[1], int) and updates.shape[1] == data.shape[1]


def _same_length(value: ir.Value, other: ir.Value) -> bool:
    """Whether axis 0 of both is known to be as long, by name or number."""
    if not value.shape or not other.shape:
        return False
    first, second = value.shape[0], other.shape[0]
    return first == second and (isinstance(first, int) or first.value is not None)


def _rewrite(graph: ir.Graph, expert: _Expert) -> None:
    scatter, weight = expert.scatter, expert.weight
    data, _places, updates = scatter.inputs
    assert data is not None and updates is not None
    # What depends on the weight alone stands before all that is computed of it.
    first = next(node for node in graph if node in expert.region.starts)
    chosen = _Chosen(graph, weight, str(scatter.outputs[0].name), first, scatter.metadata_props.get(SCOPE))
    for start in expert.region.starts:
        source = start.inputs[0]
        assert source is not None
        # A weight is zero where it was not chosen.
        rows = start.outputs[0]
        rows.replace_all_uses_with(source if source is weight else chosen.selected(source, f"{rows.name}.all", start))
    for node in expert.region.nodes:
        if node.domain == DOMAIN:
            node.metadata_props[ROWS] = str(chosen.rows(2).name)
        for value in node.outputs:
            if value.shape is not None and weight.shape is not None:
                value.shape = ir.Shape([weight.shape[0], *value.shape[1:]])
    selected = chosen.selected(updates, f"{updates.name}.all", scatter)
    added = ir.node("Add", [data, selected], metadata_props=chosen.metadata)
    graph.insert_before(scatter, added)
    replaced(scatter.outputs[0], added.outputs[0])
    graph.remove([scatter, *expert.region.starts], safe=True)


class _Chosen:
    """Which rows an expert was chosen for, in as many axes as it takes.

    Names begin with ``prefix``, and nodes stand before ``first``.
    """

    def __init__(self, graph: ir.Graph, weight: ir.Value, prefix: str, first: ir.Node, scope: str | None) -> None:
        self._graph = graph
        self._weight = weight
        self._prefix = prefix
        self._first = first
        self._scope = scope
        self._by_rank: dict[int, ir.Value] = {}
        self._zeros: dict[ir.DataType, ir.Value] = {}

    @property
    def metadata(self) -> dict[str, str]:
        """Of the nodes that stand for those of the expert."""
        return {SCOPE: self._scope} if self._scope else {}

    def selected(self, value: ir.Value, name: str, before: ir.Node) -> ir.Value:
        """``value`` in the chosen rows, and 0 in the others; the node stands before ``before``."""
        rank, dtype, shape = rank_of(value), value.dtype, value.shape
        assert rank is not None and dtype is not None and shape is not None and self._weight.shape is not None
        result = self._made("Where", [self.rows(rank), value, self._zero(dtype)], name, before)
        result.type = ir.TensorType(dtype)
        result.shape = ir.Shape([self._weight.shape[0], *shape[1:]])
        return result

    def rows(self, rank: int) -> ir.Value:
        """bool [tokens, 1, ...]; NaN is not zero, as NonZero has it."""
        if rank not in self._by_rank:
            assert self._weight.dtype is not None
            prefix, first = self._prefix, self._first
            if 1 not in self._by_rank:
                is_zero = self._made(
                    "Equal", [self._weight, self._zero(self._weight.dtype)], f"{prefix}.is_zero", first
                )
                self._by_rank[1] = self._made("Not", [is_zero], f"{prefix}.is_chosen", first)
            if rank > 1:
                axes = self._constant(np.arange(1, rank, dtype=np.int64))
                made = self._made("Unsqueeze", [self._by_rank[1], axes], f"{prefix}.is_chosen.{rank}", first)
                self._by_rank[rank] = made
        return self._by_rank[rank]

    def _zero(self, dtype: ir.DataType) -> ir.Value:
        if dtype not in self._zeros:
            self._zeros[dtype] = self._constant(np.array(0, dtype.numpy()))
        return self._zeros[dtype]

    def _constant(self, array: np.ndarray) -> ir.Value:
        node = ir.node("Constant", [], {"value": ir.tensor(array)}, metadata_props=self.metadata)
        self._graph.insert_before(self._first, node)
        return node.outputs[0]

    def _made(self, op: str, inputs: list[ir.Value], name: str, before: ir.Node) -> ir.Value:
        node = ir.node(op, inputs, metadata_props=self.metadata)
        node.outputs[0].name = name
        self._graph.insert_before(before, node)
        return node.outputs[0]
