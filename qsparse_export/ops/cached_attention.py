"""CachedAttention: rotary positions, the KV cache and causal grouped attention in one node.

Queries, keys and values come side by side in ``qkv`` [B, S, (heads + 2 kv_heads) * D], as one product leaves them. Queries
and keys are turned by ``cos``, ``sin`` [B, S, D / 2] (halves as pairs: RoFormer, arXiv 2104.09864, in Hugging Face's
layout, ONNX RotaryEmbedding). ``visible`` bool [B, 1, S, T] says which of the T = past + S keys a query may look at; it
carries causality, padding and a sliding window, and at least one key must be visible (else the row is NaN).
``y = softmax(q k^T / sqrt(D)) v``, summed in float32; query head h reads KV head h // (heads / kv_heads).

The cache may have room for more than is in it: ``past_key`` and ``past_value`` are [B, kv_heads, C, D] with C >= T - S, of
which the first T - S are filled. The new keys and values come behind those, what lies behind them stays, and the outputs
are [B, kv_heads, max(C, T), D]. So the same node serves a cache that grows (C = T - S, as ONNX Attention has it) and a
buffer that is bound as input and output at once: then the kernel writes S rows and copies nothing.

There is no torch op: no PyTorch module computes this, a pass makes it of RotaryEmbedding and Attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from qsparse_export.errors import UsageError
from qsparse_export.ops.base import DOMAIN, VERSION, Op

if TYPE_CHECKING:
    import onnx

SHARED_CACHE = "ai.qsparse.shared_cache"
"""Metadata key of a model, "true" when every cache goes through this op: past and present may be one buffer."""


def reference(
    qkv: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    visible: np.ndarray,
    past_key: np.ndarray,
    past_value: np.ndarray,
    heads: int,
    kv_heads: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The definition, computed in float64: (y, present_key, present_value) in the dtype of ``qkv``.

    UsageError when the operands do not fit each other.
    """
    batch, tokens, row = qkv.shape
    width, total = row // (heads + 2 * kv_heads), visible.shape[-1]
    room = past_key.shape[2]
    wanted = {
        "cos": (cos, (batch, tokens, width // 2)),
        "sin": (sin, (batch, tokens, width // 2)),
        "visible": (visible, (batch, 1, tokens, total)),
        "past_key": (past_key, (batch, kv_heads, room, width)),
        "past_value": (past_value, (batch, kv_heads, room, width)),
    }
    for name, (array, shape) in wanted.items():
        if array.shape != shape:
            raise UsageError(f"CachedAttention: {name} is {list(array.shape)}; expected {list(shape)}")
    if not total - tokens <= room or total < tokens or width % 2 or row != width * (heads + 2 * kv_heads):
        raise UsageError(
            f"CachedAttention: {tokens} tokens of {total} with room for {room} in the past, rows of {row}; expected "
            f"tokens <= total <= tokens + room and an even head width times {heads + 2 * kv_heads}"
        )
    by_head = qkv.astype(np.float64).reshape(batch, tokens, -1, width).transpose(0, 2, 1, 3)
    query, key, value = np.split(by_head, [heads, heads + kv_heads], axis=1)

    def turned(x: np.ndarray) -> np.ndarray:
        first, second = np.split(x, 2, axis=-1)
        c, s = cos.astype(np.float64)[:, None], sin.astype(np.float64)[:, None]
        return np.concatenate((c * first - s * second, s * first + c * second), axis=-1)

    def grown(past: np.ndarray, new: np.ndarray) -> np.ndarray:
        parts = (past[:, :, : total - tokens], new.astype(qkv.dtype), past[:, :, total:])
        return np.concatenate(parts, axis=2)

    present_key, present_value = grown(past_key, turned(key)), grown(past_value, value)
    keys, values = (
        np.repeat(cache[:, :, :total].astype(np.float64), heads // kv_heads, axis=1)
        for cache in (present_key, present_value)
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        scores = turned(query) @ keys.transpose(0, 1, 3, 2) / np.sqrt(width)
        scores = np.where(visible, scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True, initial=-np.inf))
        weights = np.where(visible, weights, 0)
        y = weights @ values / weights.sum(axis=-1, keepdims=True)
    return y.transpose(0, 2, 1, 3).reshape(batch, tokens, heads * width).astype(qkv.dtype), present_key, present_value


def _schema() -> onnx.defs.OpSchema:
    from onnx import TypeProto
    from onnx.defs import OpSchema

    def infer(context: Any) -> None:
        qkv, past = context.get_input_type(0), context.get_input_type(4)
        heads, kv_heads = (context.get_attribute(name).i for name in ("heads", "kv_heads"))
        y, present = TypeProto(), TypeProto()
        for made in (y, present):
            made.tensor_type.elem_type = qkv.tensor_type.elem_type
        if qkv.tensor_type.HasField("shape"):
            *lead, row = qkv.tensor_type.shape.dim
            y.tensor_type.shape.dim.extend(lead)
            width = y.tensor_type.shape.dim.add()
            if row.dim_value:
                width.dim_value = row.dim_value // (heads + 2 * kv_heads) * heads
        if past.tensor_type.HasField("shape"):
            for axis, dim in enumerate(past.tensor_type.shape.dim):
                copy = present.tensor_type.shape.dim.add()
                if axis != 2:  # the larger of the room and the total: no symbol says that
                    copy.CopyFrom(dim)
        context.set_output_type(0, y)
        context.set_output_type(1, present)
        context.set_output_type(2, present)

    parameter = OpSchema.FormalParameter
    schema = OpSchema(
        "CachedAttention",
        DOMAIN,
        VERSION,
        doc=__doc__ or "",
        inputs=[
            parameter("qkv", "T", "queries, keys and values [B, S, (heads + 2 kv_heads) * D]"),
            parameter("cos", "T", "cosines of the positions [B, S, D / 2]"),
            parameter("sin", "T", "sines of the positions [B, S, D / 2]"),
            parameter("visible", "tensor(bool)", "keys that a query may look at [B, 1, S, T]"),
            parameter("past_key", "T", "[B, kv_heads, C, D], the first T - S filled"),
            parameter("past_value", "T", "[B, kv_heads, C, D], the first T - S filled"),
        ],
        outputs=[
            parameter("y", "T", "[B, S, heads * D]"),
            parameter("present_key", "T", "[B, kv_heads, max(C, T), D]"),
            parameter("present_value", "T", "[B, kv_heads, max(C, T), D]"),
        ],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)"], "float32 or float16")],
        attributes=[
            OpSchema.Attribute("heads", OpSchema.AttrType.INT, "query heads", required=True),
            OpSchema.Attribute("kv_heads", OpSchema.AttrType.INT, "key and value heads", required=True),
        ],
    )
    schema.set_type_and_shape_inference_function(infer)
    return schema


# Every reader of the past comes before the Concat that writes the present, so that the two may be one buffer.
BODY = """
<domain: "ai.qsparse", opset_import: ["" : 23]>
CachedAttention <heads, kv_heads> (qkv, cos, sin, visible, past_key, past_value) => (y, present_key, present_value)
{
  query_heads = Constant <value_int: int = @heads> ()
  pair_heads = Constant <value_int: int = @kv_heads> ()
  first = Constant <value = int64[1] {0}> ()
  length_axis = Constant <value = int64[1] {2}> ()
  end = Constant <value = int64[1] {9223372036854775807}> ()
  two = Constant <value = int64 {2}> ()

  row = Shape <start = -1> (qkv)
  both_pair_heads = Mul (pair_heads, two)
  all_heads = Add (query_heads, both_pair_heads)
  head_width = Div (row, all_heads)
  query_size = Mul (head_width, query_heads)
  pair_size = Mul (head_width, pair_heads)
  sizes = Concat <axis = 0> (query_size, pair_size, pair_size)
  query, key, value = Split <axis = -1> (qkv, sizes)
  turned_query = RotaryEmbedding <num_heads: int = @heads> (query, cos, sin)
  turned_key = RotaryEmbedding <num_heads: int = @kv_heads> (key, cos, sin)

  total = Shape <start = -1> (visible)
  tokens = Shape <start = 1, end = 2> (qkv)
  filled = Sub (total, tokens)
  filled_key = Slice (past_key, first, filled, length_axis)
  filled_value = Slice (past_value, first, filled, length_axis)
  rest_key = Slice (past_key, total, end, length_axis)
  rest_value = Slice (past_value, total, end, length_axis)
  y, grown_key, grown_value = Attention <q_num_heads: int = @heads, kv_num_heads: int = @kv_heads>
    (turned_query, turned_key, value, visible, filled_key, filled_value)
  present_key = Concat <axis = 2> (grown_key, rest_key)
  present_value = Concat <axis = 2> (grown_value, rest_value)
}
"""

OP = Op("CachedAttention", None, None, _schema, BODY, reference)
