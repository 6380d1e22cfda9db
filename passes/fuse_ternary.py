"""Fuses int8 activations, ternary weights and the descaling, spelled in standard ops, into TernaryMatMul."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from qsparse_export.ops.base import DOMAIN, VERSION
from qsparse_export.passes.annotate_scope import SCOPE
from qsparse_export.passes.base import Pass, PassResult
from qsparse_export.passes.fuse_ternary_rows import QuantisedRow, RowFactor, Unlike, quantised_row, row_factor
from qsparse_export.passes.fuse_ternary_weights import (
    ConstantMatrix,
    constant_matrix,
    packed_initializer,
    ternary_of,
)
from qsparse_export.passes.fuse_topk_around import new_mask, replace
from qsparse_export.passes.fuse_topk_masks import NoMatch, root
from qsparse_export.passes.original_choices import MaskChoice, RoundingChoice, add_choice

_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


@dataclass(frozen=True)
class FuseTernary(Pass):
    """Makes ``TernaryMatMul`` of a BitNet linear as transformers and others spell it.

    Before::

        s = Div(127, Clip(ReduceMax(Abs(x), -1), 1e-5)); q = Clip(Round(Mul(x, s)), -128, 127)
        y = Mul(MatMul(Div(q, s), w), weight_scale)      # or Div(MatMul(q, w), Mul(weight_scale, s)), ...

    After::

        y = TernaryMatMul<n>(x, packed, scale)

    ``w`` is any constant that comes out as -a, 0, a. A mask between quantiser and product moves before the quantiser, which
    changes nothing. The result is TernaryMatMul's to the last bit, and the original's up to the rounding of its factors.
    """

    name: ClassVar[str] = "fuse-ternary"

    def call(self, model: ir.Model) -> PassResult:
        """See :class:`Pass`."""
        modified = False
        shared: dict[tuple[int, float], tuple[ir.Value, ir.Value]] = {}
        for node in list(model.graph):
            match = _match(node)
            if isinstance(match, _Match):
                _rewrite(model.graph, match, shared)
                modified = True
        if modified:
            model.opset_imports[DOMAIN] = VERSION
            RemoveUnusedNodesPass()(model)
        return PassResult(model, modified)


@dataclass(frozen=True)
class _Match:
    """``y`` = float(sum q * values) * gamma / 127 * alpha; ``n`` x ``k`` weights; ``bias`` is added by a Gemm."""

    product: ir.Node
    row: QuantisedRow
    weights: ir.Value
    matrix: ConstantMatrix
    shape: tuple[int, int]
    alpha: float
    y: ir.Value
    bias: ir.Value | None


def explain(graph: ir.Graph) -> dict[str, str]:
    """For every product of a quantised row that was not fused, by its name, why."""
    found = ((node.name or str(node.outputs[0].name), _match(node)) for node in graph)
    return {name: match for name, match in found if isinstance(match, str)}


def _match(node: ir.Node) -> _Match | str | None:
    if node.domain != "" or node.op_type not in ("MatMul", "Gemm"):
        return None
    try:
        row = quantised_row(node.inputs[0])
    except (Unlike, NoMatch) as why:
        return str(why)
    weights = node.inputs[1]
    if row is None or weights is None:
        return None
    if node.op_type == "Gemm" and (
        node.attributes.get_float("alpha", 1.0) != 1
        or node.attributes.get_float("beta", 1.0) != 1
        or node.attributes.get_int("transA", 0) != 0
    ):
        return "the Gemm transposes or scales"
    if row.x.dtype not in _TYPES:
        return f"x is {row.x.dtype.name if row.x.dtype else 'of unknown type'}; expected FLOAT or FLOAT16"
    matrix = constant_matrix(weights, transposed=node.attributes.get_int("transB", 0) == 1)
    if matrix is None:
        return "the weights are computed from an input"
    found = ternary_of(matrix.read())
    if isinstance(found, str):
        return found
    bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
    factor, y = _descaled(node.outputs[0], row.factor) if bias is None else (row.factor, node.outputs[0])
    if factor.power != 1 or factor.coefficient <= 0:
        return "the product is not scaled back by max(abs(x))"
    alpha = found.amplitude * factor.coefficient * 127
    return _Match(node, row, weights, matrix, found.values.shape, alpha, y, bias)


def _descaled(y: ir.Value, factor: RowFactor) -> tuple[RowFactor, ir.Value]:
    """Takes in the factors that ``y`` alone is multiplied by: the descaling and the scale of the weights."""
    while len(uses := tuple(y.uses())) == 1 and not y.is_graph_output():
        node = uses[0].node
        if node.domain != "" or node.op_type not in ("Mul", "Div", "Cast"):
            break
        result = node.outputs[0]
        if node.op_type == "Cast":
            if result.dtype not in _TYPES:
                break
            y = result
            continue
        other = node.inputs[1] if node.inputs[0] is y else node.inputs[0]
        if node.op_type == "Div" and other is node.inputs[0]:
            break
        try:
            found = row_factor(other) or _constant_factor(other)
        except Unlike:
            break
        product = factor.times(found, 1 if node.op_type == "Mul" else -1) if found is not None else None
        if product is None or product.power > 1 or _widens(other, y):
            break
        factor, y = product, result
    return factor, y


def _constant_factor(value: ir.Value | None) -> RowFactor | None:
    """A scalar that is computed from weights alone, such as mean(abs(W))."""
    if value is None or value.shape is None or any(dim != 1 for dim in value.shape.dims):
        return None
    matrix = constant_matrix(value)
    number = matrix.read() if matrix is not None else np.empty(0)
    return RowFactor(float(number.item())) if number.size == 1 else None


def _widens(factor: ir.Value | None, y: ir.Value) -> bool:
    """Whether broadcasting against ``factor`` would add axes."""
    if factor is None or factor.shape is None or y.shape is None:
        return False
    return len(factor.shape) > len(y.shape)


def _rewrite(graph: ir.Graph, match: _Match, shared: dict[tuple[int, float], tuple[ir.Value, ir.Value]]) -> None:
    product, row = match.product, match.row
    x = _in_type(row.x, match.y.dtype)
    nodes: list[ir.Node] = []
    if row.mask is not None:
        mask = new_mask(x, row.mask.mask.k, 0, "none", product)
        add_choice(mask, MaskChoice(str(x.name), str(row.mask.kept.name), (str(row.mask.masked.name),)))
        nodes.append(mask)
        x = mask.outputs[0]
    key = (id(match.weights), match.alpha)
    if key not in shared:
        shared[key] = _new_weights(graph, match)
    packed, scale = shared[key]
    fused = ir.node(
        "TernaryMatMul",
        [x, packed, scale],
        attributes={"n": match.shape[0]},
        domain=DOMAIN,
        metadata_props={SCOPE: product.metadata_props[SCOPE]} if SCOPE in product.metadata_props else None,
    )
    add_choice(fused, RoundingChoice(str(row.scaled.name), str(row.q.name), row.mask is not None))
    nodes.append(fused)
    result = fused.outputs[0]
    result.type, result.shape = x.type, match.y.shape
    if match.y.dtype is not None and match.y.dtype != x.dtype:
        nodes.append(ir.node("Cast", [result], attributes={"to": int(match.y.dtype)}))
        result = nodes[-1].outputs[0]
        result.type, result.shape = match.y.type, match.y.shape
    if match.bias is not None:
        nodes.append(ir.node("Add", [result, match.bias]))
        result = nodes[-1].outputs[0]
        result.type, result.shape = match.y.type, match.y.shape
    graph.insert_before(product, nodes)
    replace(match.y, result)


def _in_type(x: ir.Value, dtype: ir.DataType | None) -> ir.Value:
    """``x`` before a Cast that loses nothing, where that is the type asked for: the op computes in float32 by itself."""
    source = root(x)
    return source if source is not None and source.dtype == dtype and dtype in _TYPES else x


def _new_weights(graph: ir.Graph, match: _Match) -> tuple[ir.Value, ir.Value]:
    stem = match.product.metadata_props.get(SCOPE) or match.matrix.source.removesuffix(".weight")
    if f"{stem}.packed" in graph.initializers:
        stem = f"{stem}.{match.product.outputs[0].name}"
    packed = packed_initializer(match.matrix, f"{stem}.packed", *match.shape)
    alpha = ir.tensor(np.array([match.alpha], np.float32), name=f"{stem}.scale")
    scale = ir.Value(
        name=f"{stem}.scale", const_value=alpha, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.FLOAT)
    )
    graph.register_initializer(packed)
    graph.register_initializer(scale)
    return packed, scale
