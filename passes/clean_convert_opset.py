"""Converts a graph to the opset that the function bodies of our ops are written in."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qsparse_export.errors import ExportError
from qsparse_export.passes.base import Pass, PassResult

OLDEST, NEWEST = 17, 25


@dataclass(frozen=True)
class ConvertOpset(Pass):
    """Brings the standard ops of opset 17 to 25 to opset ``to``, since a function's opset must be its model's.

    Before: ``ReduceMax<axes=[-1]>(x)`` at opset 17. After: ``ReduceMax(x, [-1])`` at opset 23.
    """

    name: ClassVar[str] = "convert-opset"
    to: int = 23

    def call(self, model: ir.Model) -> PassResult:
        """See :class:`Pass`; ExportError when a node cannot be said in the other opset."""
        version = model.opset_imports.get("", self.to)
        if version == self.to:
            return PassResult(model, False)
        if not OLDEST <= version <= NEWEST:
            raise ExportError(f"the model has opset {version}; expected {OLDEST} to {NEWEST}: export it again with one")
        if version < self.to:
            _upgrade(model, self.to)
        else:
            _downgrade(model, version, self.to)
        return PassResult(model, True)


def _upgrade(model: ir.Model, to: int) -> None:
    from onnxscript.version_converter import ConvertVersionPass

    version = model.opset_imports[""]
    logger = logging.getLogger("onnxscript.version_converter")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        ConvertVersionPass(to, fallback=True)(model)
    except Exception as error:  # the converters raise whatever they meet
        raise ExportError(f"opset {version} cannot be converted to {to}: {error}") from error
    finally:
        logger.setLevel(level)
    if model.opset_imports.get("") != to:
        raise ExportError(f"opset {version} cannot be converted to {to}: export the model again with opset {to}")
    for node in _standard_nodes(model):
        for output in node.outputs:
            # onnx's converter infers without propagating values, and gives dimensions names of its own that then stay.
            if not output.is_graph_output():
                output.shape = None


def _downgrade(model: ir.Model, version: int, to: int) -> None:
    """Opsets 24 and 25 changed no op of opset 23 but added types, attributes, inputs and new ops: what uses none is the same."""
    import onnx.defs

    if to < 23:
        raise ExportError(f"opset {version} cannot be converted to {to}: opsets are lowered to 23, not further")
    for node in _standard_nodes(model):
        newest = onnx.defs.get_schema(node.op_type, version, "")
        if newest.since_version <= to:
            continue
        called = f"{node.op_type} ({node.name or node.outputs[0].name})"
        if not onnx.defs.has(node.op_type, to, ""):
            raise ExportError(f"{called} came with opset {newest.since_version}; expected ops of opset {to} only")
        schema = onnx.defs.get_schema(node.op_type, to, "")
        unknown = sorted(set(node.attributes) - set(schema.attributes))
        if unknown or len(node.inputs) > schema.max_input:
            what = ", ".join(unknown) or f"input {schema.max_input}"
            raise ExportError(f"{called} uses {what} of opset {newest.since_version}; export the model with opset {to}")
    model.graph.opset_imports[""] = to
    for function in model.functions.values():
        function.opset_imports[""] = to


def _standard_nodes(model: ir.Model) -> Iterator[ir.Node]:
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        yield from (node for node in graph.all_nodes() if node.domain == "")
