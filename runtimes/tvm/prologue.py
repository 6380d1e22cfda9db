"""Cuts a graph in two: what is computed of positions and masks alone, and the rest.

Cosines, sines and the attention mask come out of a few standard ops on tiny integer inputs, whose shapes and values depend
on each other: nothing that a compiler of static graphs is good at, and nothing that takes time. ONNX Runtime evaluates
them; the rest takes them as inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from qsparse_export.errors import BundleError

SMALL_BYTES = 1 << 12
"""Of a constant that the prologue may hold: the frequencies of rotary positions, no weights."""


@dataclass(frozen=True)
class Cut:
    """``prologue`` computes ``made`` of ``taken`` (names of graph inputs); ``rest`` takes ``made`` as inputs.

    Where there is nothing to compute beforehand, ``made`` is empty and ``prologue`` has no nodes.
    """

    prologue: onnx.ModelProto
    rest: onnx.ModelProto
    taken: tuple[str, ...]
    made: tuple[str, ...]


def cut(model: onnx.ModelProto, folder: str) -> Cut:
    """``model``, whose weights are external files in ``folder``, in two graphs of the same opset.

    Raises BundleError when a constant of the prologue cannot be read.
    """
    graph = model.graph
    early = _computed_of_integers(graph)
    maker = {name: node for node in graph.node for name in node.output}
    types = {value.name: value.type.tensor_type for value in (*graph.value_info, *graph.output)}
    movable = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BOOL)

    made: list[str] = []

    def cuts(name: str) -> bool:
        """Whether the rest takes this value as it is: integers stay with the shapes that they become."""
        return name in early and name in types and types[name].elem_type in movable

    wanted = {value.name for value in graph.output}
    kept: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if wanted.isdisjoint(node.output):
            continue
        kept.append(node)
        for name in _inputs(node):
            if cuts(name):
                if name not in made:
                    made.append(name)
            else:
                wanted.add(name)
    made.reverse()
    needed: set[str] = set(made)
    nodes: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if not needed.isdisjoint(node.output):
            nodes.append(node)
            needed |= set(_inputs(node))
    rest = onnx.ModelProto()
    rest.CopyFrom(model)
    del rest.graph.node[:], rest.graph.input[:], rest.functions[:], rest.graph.initializer[:]
    rest.graph.node.extend(reversed(kept))
    rest.graph.input.extend(value for value in graph.input if value.name in wanted)
    rest.graph.input.extend(_renamed(name, types[name]) for name in made)
    rest.graph.initializer.extend(tensor for tensor in graph.initializer if tensor.name in wanted)
    taken = tuple(value.name for value in graph.input if value.name in needed and value.name not in maker)
    prologue = onnx.helper.make_model(
        onnx.helper.make_graph(
            list(reversed(nodes)),
            "prologue",
            [value for value in graph.input if value.name in taken],
            [_renamed(name, types[name]) for name in made],
            [_inline(tensor, folder) for tensor in graph.initializer if tensor.name in needed],
        ),
        opset_imports=list(model.opset_import),
        ir_version=model.ir_version,
    )
    return Cut(prologue, rest, taken, tuple(made))


def _computed_of_integers(graph: onnx.GraphProto) -> set[str]:
    """Values that integer or boolean inputs and small constants determine, by standard ops without a graph inside."""
    numbers = (onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.BOOL)
    early = {value.name for value in graph.input if value.type.tensor_type.elem_type in numbers}
    constants = {tensor.name for tensor in graph.initializer if _size(tensor) <= SMALL_BYTES}
    for node in graph.node:
        plain = node.domain in ("", "ai.onnx") and not any(a.HasField("g") or a.graphs for a in node.attribute)
        names = _inputs(node)
        if plain and all(name in constants for name in names):
            constants |= set(node.output)
        elif plain and all(name in early or name in constants for name in names):
            early |= set(node.output)
    return early


def _size(tensor: onnx.TensorProto) -> int:
    elements = 1
    for dim in tensor.dims:
        elements *= dim
    return elements * 8


def _inputs(node: onnx.NodeProto) -> list[str]:
    return [name for name in node.input if name]


def _renamed(name: str, tensor_type: onnx.TypeProto.Tensor) -> onnx.ValueInfoProto:
    """The value as an input; dimensions that are expressions ("past + sequence") get names of their own.

    A cache with room is longer than the tokens in it, so a sum of lengths is not what its symbols say.
    """
    shape: list[int | str | None] = []
    for axis, dim in enumerate(tensor_type.shape.dim):
        plain = dim.dim_param.isidentifier()
        shape.append(dim.dim_value if dim.HasField("dim_value") else dim.dim_param if plain else f"{name}_{axis}")
    return onnx.helper.make_tensor_value_info(name, tensor_type.elem_type, shape)


def _inline(tensor: onnx.TensorProto, folder: str) -> onnx.TensorProto:
    try:
        return onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor, folder), tensor.name)
    except (ValueError, OSError, onnx.checker.ValidationError) as error:
        raise BundleError(f"{folder}: {tensor.name} cannot be read ({error}); export the bundle again") from error
