"""A checked ONNX file -> ir.Model: without the notes of other programs, which are not needed and may be no text at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsparse_export.errors import CheckpointError

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

_KEPT = "pkg.torch.onnx.name_scopes"  # which PyTorch module a node came from


def read_graph(path: Path) -> ir.Model:
    """The graph at ``path``; weights in external files are mapped, not read. CheckpointError when a name is no UTF-8 text."""
    import onnx
    import onnx_ir

    proto = onnx.load_model(path, load_external_data=False)
    try:
        _drop_notes(proto)
        model = onnx_ir.serde.deserialize_model(proto)
        _check_names(model)
    except (
        Exception
    ) as error:  # UnicodeDecodeError within onnx-ir's own, and whatever a damaged field makes of the reader
        raise CheckpointError(
            f"{path} is a damaged ONNX file ({_innermost(error)}): copy or export it again"
        ) from error
    onnx_ir.external_data.set_base_dir(model.graph, path.parent)
    return model


def _innermost(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _drop_notes(proto: onnx.ModelProto) -> None:
    for field in ("metadata_props", "doc_string", "producer_version", "domain"):
        proto.ClearField(field)
    for graph in _graphs(proto):
        for field in ("metadata_props", "doc_string"):
            graph.ClearField(field)
        values = [*graph.value_info]
        if hasattr(graph, "initializer"):
            values += [*graph.input, *graph.output, *graph.initializer]
        for value in values:
            value.ClearField("metadata_props")
            value.ClearField("doc_string")
        for node in graph.node:
            kept = [(entry.key, entry.value) for entry in node.metadata_props if _is_kept(entry)]
            node.ClearField("metadata_props")
            node.ClearField("doc_string")
            for key, value in kept:
                node.metadata_props.add(key=key, value=value)
            for attribute in node.attribute:
                attribute.ClearField("doc_string")


def _is_kept(entry: Any) -> bool:
    try:
        return entry.key == _KEPT and isinstance(entry.value, str)
    except UnicodeDecodeError:
        return False


def _graphs(proto: onnx.ModelProto) -> Iterator[Any]:
    stack: list[Any] = [proto.graph, *proto.functions]
    while stack:
        graph = stack.pop()
        yield graph
        stack.extend(a.g for node in graph.node for a in node.attribute if a.HasField("g"))
        stack.extend(g for node in graph.node for a in node.attribute for g in a.graphs)


def _check_names(model: ir.Model) -> None:
    """Writes every node once, which decodes every text in it; what is no UTF-8 raises."""
    import onnx_ir

    _ = f"{model.producer_name}"
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for node in graph:
            onnx_ir.to_proto(node)
        for node in graph.all_nodes():
            for attribute in node.attributes.values():
                # onnx-ir warns and hands the bytes on.
                if attribute.type == onnx_ir.AttributeType.STRING and isinstance(attribute.value, bytes):
                    raise ValueError(f"the attribute {attribute.name} is no text")
    for value in (*model.graph.inputs, *model.graph.outputs):
        onnx_ir.to_proto(value)
