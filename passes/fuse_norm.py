"""Fuses a residual sum and the RMS norm that reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qsparse_export.ops.base import DOMAIN, VERSION
from qsparse_export.passes.annotate_scope import SCOPE
from qsparse_export.passes.base import Pass, PassResult
from qsparse_export.passes.match import is_op, replaced, same_shape


@dataclass(frozen=True)
class FuseNorm(Pass):
    """Makes ``AddRmsNorm`` of an Add and the RMSNormalization behind it; the sum stays readable.

    Before::

        sum = Add(x, residual)
        y = RMSNormalization<axis=-1, epsilon>(sum, weight)

    After::

        sum, y = AddRmsNorm<epsilon>(x, residual, weight)

    ONNX Runtime's own SkipSimplifiedLayerNormalization is not used: it takes longer than the two nodes
    (docs/decode-overhead.md).
    """

    name: ClassVar[str] = "fuse-norm"

    def call(self, model: ir.Model) -> PassResult:
        """See :class:`Pass`."""
        modified = False
        for node in list(model.graph):
            match = _match(node)
            if isinstance(match, _Match):
                _rewrite(model.graph, match)
                model.opset_imports[DOMAIN] = VERSION
                modified = True
        return PassResult(model, modified)


@dataclass(frozen=True)
class _Match:
    add: ir.Node
    norm: ir.Node


def explain(node: ir.Node) -> str:
    """Why the RMSNormalization ``node`` is not fused, or "" where it is."""
    match = _match(node)
    return match if isinstance(match, str) else ""


def _match(norm: ir.Node) -> _Match | str:
    if not is_op(norm, "RMSNormalization"):
        return "not an RMS norm"
    total, weight = norm.inputs[0], norm.inputs[1]
    add = total.producer() if total is not None else None
    if total is None or not is_op(add, "Add") or add.graph is not norm.graph:
        return "what it reads is no sum"
    if not same_shape(add.inputs[0], add.inputs[1]):
        return "the sum broadcasts, or its shapes are not known"
    attributes = norm.attributes
    axis = attributes["axis"].as_int() if "axis" in attributes else -1
    if axis != -1 and (total.shape is None or axis != len(total.shape) - 1):
        return "it is not over the last axis alone"
    if "stash_type" in attributes and attributes["stash_type"].as_int() != ir.DataType.FLOAT:
        return "it is not computed in float32"
    if weight is None or not (weight.is_initializer() or weight.is_graph_input()):
        return "the weight is computed"
    if weight.shape is None or total.shape is None or len(weight.shape) != 1 or weight.shape[0] != total.shape[-1]:
        return "the weight is not one number for each channel"
    if weight.dtype != total.dtype or total.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return f"the sum is {total.dtype} and the weight {weight.dtype}"
    return _Match(add, norm)


def _rewrite(graph: ir.Graph, match: _Match) -> None:
    add, norm = match.add, match.norm
    epsilon = norm.attributes["epsilon"].as_float() if "epsilon" in norm.attributes else 1e-5
    # The scope of the sum: it is the value that a decoder layer gives, and the norm is often the next layer's.
    scope = add.metadata_props.get(SCOPE)
    fused = ir.node(
        "AddRmsNorm",
        [add.inputs[0], add.inputs[1], norm.inputs[1]],
        attributes={"epsilon": epsilon},
        domain=DOMAIN,
        num_outputs=2,
        metadata_props={SCOPE: scope} if scope else None,
    )
    graph.insert_before(add, fused)
    replaced(norm.outputs[0], fused.outputs[1])
    replaced(add.outputs[0], fused.outputs[0])
    graph.remove([norm, add], safe=True)
