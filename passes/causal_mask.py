"""Whether a mask that a graph computes is causal, found by computing it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

TOKENS, PAST = 3, 4


def is_causal(graph: ir.Graph, mask: ir.Value) -> bool:
    """Whether ``mask`` bool [B, 1, S, T] lets no query look at a later key, for tokens after a past without padding.

    The nodes before it are run by ONNX's evaluator on inputs of small size. A mask that depends on anything but integer
    inputs [batch, sequence] or [batch, total] (token ids and the attention mask) is not judged, and so not causal.
    """
    import onnx
    from onnx.reference import ReferenceEvaluator

    nodes = _ancestors(mask)
    wanted = {
        id(value): value for node in nodes for value in node.inputs if value is not None and value.producer() is None
    }
    inputs = [value for value in wanted.values() if value.const_value is None]
    feeds = {str(value.name): _example(value) for value in inputs}
    if mask.producer() is None or any(array is None for array in feeds.values()):
        return False
    order = {id(node): position for position, node in enumerate(graph)}
    protos = [ir.to_proto(node) for node in sorted(nodes, key=lambda node: order[id(node)])]
    constants = [
        onnx.numpy_helper.from_array(v.const_value.numpy(), v.name)
        for v in wanted.values()
        if v.const_value is not None
    ]
    made = onnx.helper.make_graph(
        protos,
        "mask",
        [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, None) for name in feeds],
        [onnx.helper.make_tensor_value_info(str(mask.name), onnx.TensorProto.BOOL, None)],
        constants,
    )
    opset = onnx.helper.make_opsetid("", graph.opset_imports.get("", 23))
    results: Any = ReferenceEvaluator(onnx.helper.make_model(made, opset_imports=[opset])).run(None, feeds)
    seen = results[0]
    causal = np.arange(PAST + TOKENS) <= np.arange(PAST, PAST + TOKENS)[:, None]
    return bool(seen.shape == (2, 1, TOKENS, PAST + TOKENS) and not (seen & ~causal).any())


def _ancestors(value: ir.Value) -> list[ir.Node]:
    found: dict[int, ir.Node] = {}
    waiting = [value]
    while waiting:
        node = waiting.pop().producer()
        if node is not None and id(node) not in found:
            found[id(node)] = node
            waiting.extend(v for v in node.inputs if v is not None)
    return list(found.values())


def _example(value: ir.Value) -> np.ndarray | None:
    """Ones for two sequences: the most that a mask of attended slots can let through."""
    if value.dtype != ir.DataType.INT64 or value.shape is None or len(value.shape) != 2:
        return None
    lengths = {"sequence": TOKENS, "total": PAST + TOKENS}
    length = lengths.get(str(value.shape[1]))
    return None if length is None else np.ones((2, length), np.int64)
