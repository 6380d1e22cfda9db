"""Lowers attention to ONNX Runtime's GroupQueryAttention, for runtimes without our library that share the cache's buffer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qsparse_export.ops.cached_attention import SHARED_CACHE
from qsparse_export.passes.annotate_scope import SCOPE
from qsparse_export.passes.base import Pass, PassResult
from qsparse_export.passes.causal_mask import is_causal
from qsparse_export.passes.fuse_attention import AttentionMatch, all_caches_have_room, match_attention
from qsparse_export.passes.match import replaced

DOMAIN = "com.microsoft"
HEAD_MULTIPLE = 8  # of the kernel


@dataclass(frozen=True)
class FuseGqa(Pass):
    """Makes ``com.microsoft::GroupQueryAttention`` of Attention; positions stay in RotaryEmbedding, the mask becomes a bias.

    Before::

        y, present_key, present_value = Attention(q, k, v, visible, past_key, past_value)

    After::

        bias = Where(visible, 0, lowest); total = Shape(visible)[3]; lengths = [total - 1] * batch   # once for all layers
        y, present_key, present_value = GroupQueryAttention(q, k, v, past_key, past_value, lengths, total, , , , bias)

    Not in any default pipeline: only with past and present bound to one buffer is it faster than Attention, and our own
    CachedAttention is faster than both (docs/decode-overhead.md). Left padding and positions keep their meaning, since
    every row counts as full and the bias hides its padding; GroupQueryAttention's own seqlens_k knows right padding only.
    What is lost: ONNX Runtime refuses, with an error, several tokens of several sequences after a filled cache. The op is
    causal, so a mask that is not provably so is left alone.
    """

    name: ClassVar[str] = "fuse-gqa"

    def call(self, model: ir.Model) -> PassResult:
        """See :class:`Pass`."""
        shared: dict[int, _MaskValues] = {}
        modified = False
        for node in list(model.graph):
            match = _match(model.graph, node)
            if isinstance(match, AttentionMatch):
                _rewrite(model, match, shared)
                modified = True
        if modified and all_caches_have_room(model.graph) and model.metadata_props.get(SHARED_CACHE) != "true":
            model.metadata_props[SHARED_CACHE] = "true"
        return PassResult(model, modified)


@dataclass(frozen=True)
class _MaskValues:
    """What GroupQueryAttention takes instead of a mask: int32 [B] and [1], and ``bias`` [B, 1, S, T]."""

    lengths: ir.Value
    total: ir.Value
    bias: ir.Value


def explain(graph: ir.Graph, node: ir.Node) -> str:
    """Why the Attention ``node`` of ``graph`` is not lowered, or "" where it is."""
    match = _match(graph, node)
    return match if isinstance(match, str) else ""


def _match(graph: ir.Graph, node: ir.Node) -> AttentionMatch | str:
    match = match_attention(node)
    if isinstance(match, str):
        return match
    mask, key = node.inputs[3], node.inputs[4]
    assert mask is not None
    width = key.shape[-1] if key is not None and key.shape is not None else None
    if not isinstance(width, int) or width % HEAD_MULTIPLE:
        return f"heads are {width} wide, and GroupQueryAttention takes multiples of {HEAD_MULTIPLE}"
    if not is_causal(graph, mask):
        return "the mask is not provably causal, and GroupQueryAttention is"
    return match


def _rewrite(model: ir.Model, match: AttentionMatch, shared: dict[int, _MaskValues]) -> None:
    graph, attention = model.graph, match.attention
    mask = attention.inputs[3]
    assert mask is not None
    if id(mask) not in shared:
        query = attention.inputs[0]
        assert query is not None and query.dtype is not None
        shared[id(mask)] = _mask_values(graph, mask, attention, query.dtype)
    values = shared[id(mask)]
    scope = attention.metadata_props.get(SCOPE)
    made = ir.node(
        "GroupQueryAttention",
        [*attention.inputs[:3], *attention.inputs[4:6], values.lengths, values.total, None, None, None, values.bias],
        attributes={"num_heads": match.heads, "kv_num_heads": match.kv_heads},
        domain=DOMAIN,
        num_outputs=3,
        metadata_props={SCOPE: scope} if scope else None,
    )
    graph.insert_before(attention, made)
    for old, new in zip(attention.outputs[:3], made.outputs, strict=True):
        replaced(old, new)
    graph.remove(attention, safe=True)
    model.opset_imports.setdefault(DOMAIN, 1)


def _mask_values(graph: ir.Graph, mask: ir.Value, before: ir.Node, dtype: ir.DataType) -> _MaskValues:
    """Nodes that make the values, inserted before ``before``; they belong to no module."""

    def constant(label: str, array: np.ndarray) -> ir.Value:
        name = f"{mask.name}.{label}"
        value = ir.Value(
            name=name, const_value=ir.tensor(array, name=name), type=ir.TensorType(ir.DataType(dtypes[array.dtype]))
        )
        value.shape = ir.Shape(array.shape)
        graph.register_initializer(value)
        return value

    def made(label: str, op: str, inputs: list[ir.Value], **attributes: int) -> ir.Value:
        node = ir.node(op, inputs, attributes=attributes)
        node.outputs[0].name = f"{mask.name}.{label}"
        graph.insert_before(before, node)
        return node.outputs[0]

    dtypes = {np.dtype(np.int32): ir.DataType.INT32, dtype.numpy(): dtype}
    zero, lowest = (
        constant(n, np.array(v, dtype.numpy())) for n, v in (("zero", 0), ("lowest", np.finfo(dtype.numpy()).min))
    )
    one = constant("one", np.array(1, np.int32))
    bias = made("bias", "Where", [mask, zero, lowest])
    total = made("total", "Cast", [made("length", "Shape", [mask], start=3)], to=int(ir.DataType.INT32))
    last = made("last", "Sub", [total, one])
    lengths = made("lengths", "Expand", [last, made("batch", "Shape", [mask], start=0, end=1)])
    return _MaskValues(lengths, total, bias)
