"""Keeps of the exporter's notes the one that outlives this machine: which PyTorch module a node came from."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qsparse_export.passes.base import Pass, PassResult

SCOPE = "ai.qsparse.scope"
_OURS = "ai.qsparse."
_EXPORTER_SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class AnnotateScope(Pass):
    """Replaces all metadata but our own by ``ai.qsparse.scope``, the qualified name of the PyTorch module of each node.

    Before: ``metadata_props = {pkg.torch.onnx.stack_trace: "/home/...", ...}``.
    After: ``metadata_props = {ai.qsparse.scope: "model.layers.0.mlp.down_proj"}``.
    """

    name: ClassVar[str] = "annotate-scope"

    def call(self, model: ir.Model) -> PassResult:
        """See :class:`Pass`."""
        modified = bool(
            model.metadata_props or model.graph.metadata_props or model.doc_string or model.graph.doc_string
        )
        model.metadata_props.clear()
        model.graph.metadata_props.clear()
        model.doc_string = model.graph.doc_string = None
        for node in model.graph.all_nodes():
            modified |= _annotate(node)
        for value in (*model.graph.inputs, *model.graph.initializers.values()):
            modified |= bool(value.metadata_props)
            value.metadata_props.clear()
        return PassResult(model, modified)


def _annotate(node: ir.Node) -> bool:
    scope = _scope(node)
    wanted = {key: text for key, text in node.metadata_props.items() if key.startswith(_OURS)}
    if scope:
        wanted[SCOPE] = scope
    modified = dict(node.metadata_props) != wanted or bool(node.doc_string)
    node.metadata_props.clear()
    node.metadata_props.update(wanted)
    node.doc_string = None
    for output in node.outputs:
        modified |= bool(output.metadata_props or output.doc_string)
        output.metadata_props.clear()
        output.doc_string = None
    return modified


def _scope(node: ir.Node) -> str:
    if SCOPE in node.metadata_props:
        return node.metadata_props[SCOPE]
    scopes = node.metadata_props.get(_EXPORTER_SCOPES)
    if not scopes:
        return ""
    # The exporter writes a Python list: outermost module first, then the node itself.
    try:
        modules = ast.literal_eval(scopes)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return ""  # a note of another program, and not what torch.onnx writes
    is_path = isinstance(modules, list) and len(modules) > 1 and isinstance(modules[-2], str)
    return modules[-2] if is_path else ""
