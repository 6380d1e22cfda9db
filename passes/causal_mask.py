"""Whether a mask that a graph computes is causal, found by computing it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

TOKENS, PAST = 3, 4
LONGEST = 1 << 17
"""Slots of the past for which a mask is shown to hide none of them: a sliding window of fewer is seen."""


def is_causal(graph: ir.Graph, mask: ir.Value) -> bool:
    """Whether ``mask`` bool [B, 1, S, T] lets no query look at a later key, for tokens after a past without padding.

    The nodes before it are run by ONNX's evaluator on inputs of small size. A mask that depends on anything but integer
    inputs [batch, sequence] or [batch, total] (token ids and the attention mask) is not judged, and so not causal.
    """
    seen = _evaluated(graph, mask, np.ones((2, PAST + TOKENS), np.int64))
    causal = np.arange(PAST + TOKENS) <= np.arange(PAST, PAST + TOKENS)[:, None]
    return seen is not None and bool(seen.shape == (2, 1, TOKENS, PAST + TOKENS) and not (seen & ~causal).any())


def attended_slots(graph: ir.Graph, mask: ir.Value) -> ir.Value | None:
    """The input int64 [batch, total] that says which slots are filled, where ``mask`` is that and causality and no more.

    Found as in :func:`is_causal`, with a past of ``LONGEST`` slots and a sequence that is padded on the right: what a
    query in the padding sees does not matter. None for any other mask, such as one with a sliding window.
    """
    totals = [value for value in _inputs(_ancestors(mask)) if _axis(value) == "total"]
    if len(totals) != 1:
        return None
    filled = np.ones((2, LONGEST + TOKENS), np.int64)
    filled[1, -1] = 0
    seen = _evaluated(graph, mask, filled)
    if seen is None or seen.shape != (2, 1, TOKENS, LONGEST + TOKENS):
        return None
    positions = np.arange(LONGEST + TOKENS)
    wanted = (positions <= positions[LONGEST:, None]) & (filled[:, None, None, :] != 0)
    is_query = filled[:, LONGEST:] != 0
    return totals[0] if (seen == wanted).all(axis=-1)[:, 0][is_query].all() else None


def _evaluated(graph: ir.Graph, mask: ir.Value, attended: np.ndarray) -> np.ndarray | None:
    """``mask`` for ``TOKENS`` tokens of two sequences whose slots are ``attended`` int64 [2, total]; None if not judged."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    nodes = _ancestors(mask)
    feeds: dict[str, np.ndarray] = {}
    for value in _inputs(nodes):
        axis = _axis(value)
        if axis is None:
            return None
        feeds[str(value.name)] = attended if axis == "total" else np.ones((2, TOKENS), np.int64)
    if mask.producer() is None:
        return None
    order = {id(node): position for position, node in enumerate(graph)}
    protos = [ir.to_proto(node) for node in sorted(nodes, key=lambda node: order[id(node)])]
    constants = [
        onnx.numpy_helper.from_array(v.const_value.numpy(), v.name)
        for v in _sources(nodes)
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
    return results[0]


def _sources(nodes: list[ir.Node]) -> list[ir.Value]:
    """What ``nodes`` read and no node makes: inputs of the graph and initialisers, each once."""
    found = {id(value): value for node in nodes for value in node.inputs if value is not None and not value.producer()}
    return list(found.values())


def _inputs(nodes: list[ir.Node]) -> list[ir.Value]:
    return [value for value in _sources(nodes) if value.const_value is None]


def _axis(value: ir.Value) -> str | None:
    """What an integer input [batch, ...] is long: the "sequence" or the "total"; None for any other value."""
    if value.dtype != ir.DataType.INT64 or value.shape is None or len(value.shape) != 2:
        return None
    axis = str(value.shape[1])
    return axis if axis in ("sequence", "total") else None


def _ancestors(value: ir.Value) -> list[ir.Node]:
    found: dict[int, ir.Node] = {}
    waiting = [value]
    while waiting:
        node = waiting.pop().producer()
        if node is not None and id(node) not in found:
            found[id(node)] = node
            waiting.extend(v for v in node.inputs if v is not None)
    return list(found.values())
