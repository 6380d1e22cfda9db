"""Repeats the last decoder layer of a traced graph: torch.export needs seconds per layer, and all layers look the same.

The result is the graph that tracing every layer gives, with other names of inner values; verification runs it against the
whole PyTorch model like any other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import onnx_ir as ir

from qsparse_export.config import ModelConfig, topk_of
from qsparse_export.errors import ExportError
from qsparse_export.passes.annotate_scope import SCOPE

TRACED = 2  # the first layer, which may differ in its masks, and the one that stands for all others

_DATA_DEPENDENT = re.compile(r"\bu\d+\b")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def layers_to_trace(config: ModelConfig) -> int:
    """How many layers must be traced: all of them when masks differ between layers beyond the first, else at most two."""
    places = [f"self_attn.{p}" for p in _PROJECTIONS[:4]]
    experts = [f"mlp.experts.{e}" for e in range(config.moe.experts)] if config.moe else ["mlp"]
    places += [f"{expert}.{p}" for expert in experts for p in _PROJECTIONS[4:]]
    for layer in range(TRACED, config.layers):
        for place in places:
            masks = (topk_of(config.sparsity, f"model.layers.{i}.{place}") for i in (TRACED - 1, layer))
            if len(set(masks)) > 1:
                return config.layers
    return min(TRACED, config.layers)


def repeat_last_layer(graph: ir.Graph, layers: int) -> None:
    """Appends copies of layer ``TRACED - 1`` until ``graph`` has ``layers``, with their inputs, outputs and initialisers.

    Nodes must carry their PyTorch module in the metadata ``ai.qsparse.scope``. Copies of initialisers have no value yet.
    Raises ExportError when the layer does not have exactly one hidden state in and one out.
    """
    last = TRACED - 1
    nodes = [node for node in graph if _is_in_layer(node, last)]
    made = {id(output) for node in nodes for output in node.outputs}
    before = [
        value
        for value in _inputs(nodes)
        if id(value) not in made
        and (producer := value.producer()) is not None
        and _is_in_layer(producer, last - 1)
        and producer.op_type != "Constant"  # the exporter shares constants between layers
    ]
    after = [
        output
        for node in nodes
        for output in node.outputs
        if any(not _is_in_layer(use.node, last) for use in output.uses()) and node.op_type != "Constant"
    ]
    if len({id(value) for value in before}) != 1 or len(after) != 1 or any(_has_subgraph(node) for node in nodes):
        raise ExportError(
            f"layer {last} of the traced decoder has {len(before)} values in and {len(after)} out; expected the hidden "
            "state alone, which is a fault of this compiler"
        )
    hidden_in, hidden_out = before[0], after[0]
    outside = [use for use in hidden_out.uses() if not _is_in_layer(use.node, last)]
    end = nodes[-1]
    hidden = hidden_out
    for layer in range(TRACED, layers):
        copies, values = _copy(graph, nodes, {id(hidden_in): hidden}, last, layer)
        graph.insert_after(end, copies)
        end, hidden = copies[-1], values[id(hidden_out)]
    for use in outside:
        use.node.replace_input_with(use.idx, hidden)


def _copy(
    graph: ir.Graph, nodes: list[ir.Node], values: dict[int, ir.Value], last: int, layer: int
) -> tuple[list[ir.Node], dict[int, ir.Value]]:
    """Copies of ``nodes`` for ``layer``; ``values`` maps originals to what stands for them, and grows."""
    for value in _inputs(nodes):
        if id(value) not in values and (value.is_graph_input() or value.is_initializer()):
            name = _renamed(value.name or "", last, layer)
            if name != value.name:
                values[id(value)] = copy = ir.Value(name=name, shape=value.shape, type=value.type)
                copy.const_value = value.const_value
                if value.is_initializer():
                    graph.register_initializer(copy)
                else:
                    graph.inputs.append(copy)
    copies = []
    outputs = {id(output) for output in graph.outputs}
    for node in nodes:
        copy_node = ir.Node(
            node.domain,
            node.op_type,
            [None if value is None else values.get(id(value), value) for value in node.inputs],
            list(node.attributes.values()),
            overload=node.overload,
            num_outputs=len(node.outputs),
            name=f"{node.name}.layer{layer}",
            metadata_props={SCOPE: _renamed(node.metadata_props.get(SCOPE, "") + ".", last, layer)[:-1]},
        )
        for original, output in zip(node.outputs, copy_node.outputs, strict=True):
            is_output = id(original) in outputs
            output.name = _renamed(original.name or "", last, layer) if is_output else f"{original.name}.layer{layer}"
            output.shape, output.type = _shape(original, layer), original.type
            values[id(original)] = output
            if is_output:
                graph.outputs.append(output)
        copies.append(copy_node)
    return copies, values


def _shape(value: ir.Value, layer: int) -> ir.Shape | None:
    """The shape for a copy: data-dependent dimensions (torch names them u0, u1, ...) are another number in each layer."""
    if value.shape is None:
        return None
    dims = [
        dim if isinstance(dim, int) else _DATA_DEPENDENT.sub(rf"\g<0>_layer{layer}", str(dim)) for dim in value.shape
    ]
    return ir.Shape(dims)


def _inputs(nodes: list[ir.Node]) -> Iterator[ir.Value]:
    """Every value that ``nodes`` read, once, in order."""
    seen = set()
    for node in nodes:
        for value in node.inputs:
            if value is not None and id(value) not in seen:
                seen.add(id(value))
                yield value


def _is_in_layer(node: ir.Node, layer: int) -> bool:
    return f"{node.metadata_props.get(SCOPE, '')}.".startswith(f"model.layers.{layer}.")


def _has_subgraph(node: ir.Node) -> bool:
    return any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())


def _renamed(name: str, last: int, layer: int) -> str:
    for prefix in ("model.layers.", "past_key_values.", "present."):
        if name.startswith(f"{prefix}{last}."):
            return f"{prefix}{layer}." + name.removeprefix(f"{prefix}{last}.")
    return name
