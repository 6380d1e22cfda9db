"""Fuses rotary positions, the KV cache and attention into one node whose cache may be a buffer with room."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qsparse_export.ops.base import DOMAIN, VERSION
from qsparse_export.ops.cached_attention import SHARED_CACHE
from qsparse_export.passes.annotate_scope import SCOPE
from qsparse_export.passes.base import Pass, PassResult
from qsparse_export.passes.match import drop_unused, is_op, replaced, sole_reader


@dataclass(frozen=True)
class FuseAttention(Pass):
    """Makes ``CachedAttention`` of two RotaryEmbedding and the Attention behind them.

    Before::

        q, k, v = Split<axis=-1>(qkv)
        y, present_key, present_value = Attention(
            RotaryEmbedding(q, cos, sin), RotaryEmbedding(k, cos, sin), v, visible, past_key, past_value)

    After::

        y, present_key, present_value = CachedAttention<heads, kv_heads>(qkv, cos, sin, visible, past_key, past_value)

    Three products of their own are joined by a Concat. Masks, left padding, positions and the lengths that a cache may have
    mean what they meant. When every cache of the graph goes through such nodes, the model's metadata say so
    (``ai.qsparse.shared_cache``): the caller may then bind one buffer with room for more tokens as past and present.
    """

    name: ClassVar[str] = "fuse-attention"

    def call(self, model: ir.Model) -> PassResult:
        """See :class:`Pass`."""
        modified = False
        for node in list(model.graph):
            match = match_attention(node)
            if isinstance(match, AttentionMatch):
                _rewrite(model.graph, match)
                model.opset_imports[DOMAIN] = VERSION
                modified = True
        if all_caches_have_room(model.graph) and model.metadata_props.get(SHARED_CACHE) != "true":
            model.metadata_props[SHARED_CACHE] = "true"
            modified = True
        return PassResult(model, modified)


@dataclass(frozen=True)
class AttentionMatch:
    """An Attention node with its rotary embeddings, and the Split of q, k and v where they come from one product."""

    attention: ir.Node
    rotary_query: ir.Node
    rotary_key: ir.Node
    split: ir.Node | None
    heads: int
    kv_heads: int


def explain(node: ir.Node) -> str:
    """Why the Attention ``node`` is not fused, or "" where it is."""
    match = match_attention(node)
    return match if isinstance(match, str) else ""


def match_attention(node: ir.Node) -> AttentionMatch | str:
    """The match at ``node``, or why there is none."""
    if not is_op(node, "Attention"):
        return "not ONNX Attention"
    inputs = list(node.inputs) + [None] * (7 - len(node.inputs))
    query, key, value, mask, past_key, past_value, lengths = inputs[:7]
    if None in (query, key, value, mask, past_key, past_value) or lengths is not None or len(node.outputs) < 3:
        return "it has no boolean mask, no KV cache, or a padding length"
    if len(node.outputs) > 3 and (node.outputs[3].uses() or node.outputs[3].is_graph_output()):
        return "its scores are read"
    assert query is not None and key is not None and value is not None and mask is not None and past_key is not None
    rotary_query, rotary_key = query.producer(), key.producer()
    if not is_op(rotary_query, "RotaryEmbedding") or not is_op(rotary_key, "RotaryEmbedding"):
        return "queries and keys do not both come from RotaryEmbedding"
    if not sole_reader(query, node) or not sole_reader(key, node):
        return "turned queries or keys are read elsewhere too"
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    heads, kv_heads = attributes.get("q_num_heads", 0), attributes.get("kv_num_heads", 0)
    if not heads or not kv_heads or heads % kv_heads:
        return "its heads are not side by side in the last axis"
    cos = rotary_query.inputs[1]
    width = _last_dim(cos) * 2
    scale = attributes.get("scale")
    plain = attributes.get("is_causal", 0) == 0 and attributes.get("softcap", 0.0) == 0.0
    if not plain or (scale is not None and not math.isclose(scale, width**-0.5, rel_tol=1e-6)):
        return "it caps, scales or masks in another way than the kernel"
    for rotary, count in ((rotary_query, heads), (rotary_key, kv_heads)):
        if not _is_plain_rotary(rotary, count) or rotary.inputs[1] is not cos:
            return "the rotary embeddings are interleaved, partial, or of positions of their own"
    if rotary_query.inputs[2] is not rotary_key.inputs[2]:
        return "queries and keys are turned by different angles"
    if width <= 0 or [_last_dim(v) for v in (rotary_query.inputs[0], rotary_key.inputs[0], value)] != [
        heads * width,
        kv_heads * width,
        kv_heads * width,
    ]:
        return "keys and values have another width than queries, or their shapes are not known"
    if mask.dtype != ir.DataType.BOOL or not _is_mask_of(mask, query):
        return "its mask is not a boolean one for each sequence and all heads"
    if query.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        return f"the kernel takes no {query.dtype}"
    return AttentionMatch(
        node, rotary_query, rotary_key, _common_split(rotary_query, rotary_key, node), heads, kv_heads
    )


def _last_dim(value: ir.Value | None) -> int:
    dim = value.shape[-1] if value is not None and value.shape is not None and len(value.shape) else None
    return dim if isinstance(dim, int) else -1


def _is_plain_rotary(node: ir.Node, heads: int) -> bool:
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    cos = node.inputs[1]
    has_positions = len(node.inputs) > 3 and node.inputs[3] is not None
    is_plain = not attributes.get("interleaved", 0) and not attributes.get("rotary_embedding_dim", 0)
    is_batched = cos is not None and cos.shape is not None and len(cos.shape) == 3
    return is_plain and is_batched and not has_positions and attributes.get("num_heads", 0) == heads


def _is_mask_of(mask: ir.Value, query: ir.Value) -> bool:
    if mask.shape is None or query.shape is None or len(mask.shape) != 4 or len(query.shape) != 3:
        return False
    return mask.shape[1] == 1 and (str(mask.shape[0]), str(mask.shape[2])) == tuple(str(d) for d in query.shape[:2])


def _common_split(rotary_query: ir.Node, rotary_key: ir.Node, attention: ir.Node) -> ir.Node | None:
    """The Split that gives queries, keys and values in that order and to nobody else, if there is one."""
    values = (rotary_query.inputs[0], rotary_key.inputs[0], attention.inputs[2])
    split = values[0].producer() if values[0] is not None else None
    if not is_op(split, "Split") or len(split.outputs) != 3:
        return None
    x = split.inputs[0]
    axis = split.attributes["axis"].as_int() if "axis" in split.attributes else 0
    if x is None or x.shape is None or axis not in (-1, len(x.shape) - 1):
        return None
    readers = (rotary_query, rotary_key, attention)
    is_whole = all(a is b for a, b in zip(values, split.outputs, strict=True))
    return split if is_whole and all(map(sole_reader, values, readers)) else None


def _rewrite(graph: ir.Graph, match: AttentionMatch) -> None:
    attention = match.attention
    scope = attention.metadata_props.get(SCOPE)
    metadata = {SCOPE: scope} if scope else {}
    made = []
    if match.split is not None:
        qkv = match.split.inputs[0]
    else:
        parts = [match.rotary_query.inputs[0], match.rotary_key.inputs[0], attention.inputs[2]]
        made.append(ir.node("Concat", parts, attributes={"axis": -1}, metadata_props=dict(metadata)))
        qkv = made[0].outputs[0]
        first = parts[0]
        assert first is not None and first.shape is not None
        qkv.name, qkv.type = f"{attention.outputs[0].name}.qkv", first.type
        qkv.shape = ir.Shape([*first.shape[:-1], sum(_last_dim(part) for part in parts)])
    made.append(
        ir.node(
            "CachedAttention",
            [qkv, *match.rotary_query.inputs[1:3], *attention.inputs[3:6]],
            attributes={"heads": match.heads, "kv_heads": match.kv_heads},
            domain=DOMAIN,
            num_outputs=3,
            metadata_props=dict(metadata),
        )
    )
    graph.insert_before(attention, made)
    for old, new in zip(attention.outputs[:3], made[-1].outputs, strict=True):
        replaced(old, new)
    gone = [attention, match.rotary_query, match.rotary_key, *([match.split] if match.split is not None else [])]
    sizes = match.split.inputs[1:] if match.split is not None else ()
    graph.remove(gone, safe=True)
    drop_unused(graph, sizes)


def all_caches_have_room(graph: ir.Graph) -> bool:
    """Whether attention reads and writes its caches at the graph's border, in ops alone that take a cache with room."""
    caches = []
    for node in graph:
        if is_op(node, "CachedAttention", DOMAIN):
            caches += [(node, *pair) for pair in zip(node.inputs[4:6], node.outputs[1:3], strict=True)]
        elif is_op(node, "GroupQueryAttention", "com.microsoft"):
            caches += [(node, *pair) for pair in zip(node.inputs[3:5], node.outputs[1:3], strict=True)]
        elif is_op(node, "Attention"):
            return False
    return bool(caches) and all(
        past is not None and past.is_graph_input() and sole_reader(past, node) and present.is_graph_output()
        for node, past, present in caches
    )
