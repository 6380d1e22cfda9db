"""Lowers attention to ONNX Runtime's GroupQueryAttention, where no kernel of ours is and past and present are one buffer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qsparse_export.errors import UsageError
from qsparse_export.ops.cached_attention import SHARED_CACHE
from qsparse_export.passes.annotate_scope import SCOPE
from qsparse_export.passes.base import Pass, PassResult
from qsparse_export.passes.causal_mask import attended_slots, is_causal
from qsparse_export.passes.fuse_attention import AttentionMatch, all_caches_have_room, match_attention
from qsparse_export.passes.match import replaced

DOMAIN = "com.microsoft"
HEAD_MULTIPLE = 8  # of the kernel
PADDING = ("any", "right")


@dataclass(frozen=True)
class FuseGqa(Pass):
    """Makes ``com.microsoft::GroupQueryAttention`` of Attention; positions stay in RotaryEmbedding, the mask becomes a bias.

    Before::

        y, present_key, present_value = Attention(q, k, v, visible, past_key, past_value)

    After::

        bias = Where(visible, 0, lowest); total = Shape(visible)[3]; lengths = [total - 1] * batch   # once for all layers
        y, present_key, present_value = GroupQueryAttention(q, k, v, past_key, past_value, lengths, total, , , , bias)

    With ``padding=right``, the mask of attended slots alone says how much of each row counts, and the bias is gone::

        lengths = Cast<int32>(ReduceSum<axis=1>(attention_mask)) - 1; total = Shape(attention_mask)[1]

    On CPUs GroupQueryAttention is faster than Attention only with past and present bound to one buffer, and our own
    CachedAttention is faster than both (docs/decode-overhead.md): there it is in no default pipeline. With a bias every row
    counts as full and the bias hides its padding, so that left padding and positions keep their meaning; ONNX Runtime
    refuses, with an error, several tokens of several sequences after a filled cache. ``right`` is for CUDA, whose kernel
    takes a bias only since ONNX Runtime 1.31 and then not the flash one, and float16 alone (docs/adr/cuda-pads-right.md): rows
    are padded on the right, as onnxruntime-genai does. The op is causal, so a mask that is not provably so is left alone.
    """

    padding: str = "any"

    name: ClassVar[str] = "fuse-gqa"

    def call(self, model: ir.Model) -> PassResult:
        """See :class:`Pass`."""
        if self.padding not in PADDING:
            raise UsageError(f"pass {self.name}: padding={self.padding}; expected {' or '.join(PADDING)}")
        shared: dict[int, _MaskValues] = {}
        modified = False
        for node in list(model.graph):
            match = _match(model.graph, node, self.padding)
            if isinstance(match, AttentionMatch):
                _rewrite(model, match, shared, self.padding)
                modified = True
        if modified and all_caches_have_room(model.graph) and model.metadata_props.get(SHARED_CACHE) != "true":
            model.metadata_props[SHARED_CACHE] = "true"
        return PassResult(model, modified)


@dataclass(frozen=True)
class _MaskValues:
    """What GroupQueryAttention takes instead of a mask: int32 [B] and [1], and ``bias`` [B, 1, S, T], or none."""

    lengths: ir.Value
    total: ir.Value
    bias: ir.Value | None


def explain(graph: ir.Graph, node: ir.Node, padding: str = "any") -> str:
    """Why the Attention ``node`` of ``graph`` is not lowered, or "" where it is."""
    match = _match(graph, node, padding)
    return match if isinstance(match, str) else ""


def _match(graph: ir.Graph, node: ir.Node, padding: str) -> AttentionMatch | str:
    match = match_attention(node)
    if isinstance(match, str):
        return match
    mask, key = node.inputs[3], node.inputs[4]
    assert mask is not None
    width = key.shape[-1] if key is not None and key.shape is not None else None
    if not isinstance(width, int) or width % HEAD_MULTIPLE:
        return f"heads are {width} wide, and GroupQueryAttention takes multiples of {HEAD_MULTIPLE}"
    if padding == "right" and node.outputs[0].dtype != ir.DataType.FLOAT16:
        return "CUDA's kernel takes float16 alone"
    if padding == "right" and attended_slots(graph, mask) is None:
        return "the mask is not provably that of attended slots and causal, and nothing more"
    if padding != "right" and not is_causal(graph, mask):
        return "the mask is not provably causal, and GroupQueryAttention is"
    return match


def _rewrite(model: ir.Model, match: AttentionMatch, shared: dict[int, _MaskValues], padding: str) -> None:
    graph, attention = model.graph, match.attention
    mask = attention.inputs[3]
    assert mask is not None
    if id(mask) not in shared:
        query = attention.inputs[0]
        assert query is not None and query.dtype is not None
        attended = attended_slots(graph, mask) if padding == "right" else None
        made_before = _Maker(graph, str(mask.name), attention)
        shared[id(mask)] = _lengths_of(attended, made_before) if attended else _bias_of(mask, made_before, query.dtype)
    values = shared[id(mask)]
    scope = attention.metadata_props.get(SCOPE)
    bias = [None, None, None, values.bias] if values.bias else []
    made = ir.node(
        "GroupQueryAttention",
        [*attention.inputs[:3], *attention.inputs[4:6], values.lengths, values.total, *bias],
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


@dataclass(frozen=True)
class _Maker:
    """Makes constants, and nodes before ``before`` that belong to no module; names begin with ``prefix``."""

    graph: ir.Graph
    prefix: str
    before: ir.Node

    def constant(self, label: str, array: np.ndarray, dtype: ir.DataType) -> ir.Value:
        name = f"{self.prefix}.{label}"
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name), type=ir.TensorType(dtype))
        value.shape = ir.Shape(array.shape)
        self.graph.register_initializer(value)
        return value

    def node(self, label: str, op: str, inputs: list[ir.Value], **attributes: int) -> ir.Value:
        node = ir.node(op, inputs, attributes=attributes)
        node.outputs[0].name = f"{self.prefix}.{label}"
        self.graph.insert_before(self.before, node)
        return node.outputs[0]

    def length(self, value: ir.Value, axis: int) -> ir.Value:
        """int32 [1]: how long ``value`` is along its last axis, number ``axis``."""
        return self.node(
            "total", "Cast", [self.node("length", "Shape", [value], start=axis)], to=int(ir.DataType.INT32)
        )

    def one(self) -> ir.Value:
        return self.constant("one", np.array(1, np.int32), ir.DataType.INT32)


def _bias_of(mask: ir.Value, make: _Maker, dtype: ir.DataType) -> _MaskValues:
    """Every row is full; what a query may not look at has the lowest bias."""
    zero, lowest = (
        make.constant(n, np.array(v, dtype.numpy()), dtype)
        for n, v in (("zero", 0), ("lowest", np.finfo(dtype.numpy()).min))
    )
    bias = make.node("bias", "Where", [mask, zero, lowest])
    total = make.length(mask, 3)
    last = make.node("last", "Sub", [total, make.one()])
    lengths = make.node("lengths", "Expand", [last, make.node("batch", "Shape", [mask], start=0, end=1)])
    return _MaskValues(lengths, total, bias)


def _lengths_of(attended: ir.Value, make: _Maker) -> _MaskValues:
    """A row is as long as it has attended slots, int64 [B, T] of 0 and 1."""
    axis = make.constant("axis", np.array([1], np.int64), ir.DataType.INT64)
    count = make.node("count", "ReduceSum", [attended, axis], keepdims=0)
    narrow = make.node("narrow_count", "Cast", [count], to=int(ir.DataType.INT32))
    return _MaskValues(make.node("lengths", "Sub", [narrow, make.one()]), make.length(attended, 1), None)
