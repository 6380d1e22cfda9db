"""Lowers standard ops that a runtime lacks to the simpler ones that ONNX itself defines them by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import onnx_ir as ir

from qsparse_export.errors import ExportError, UsageError
from qsparse_export.passes.annotate_scope import SCOPE
from qsparse_export.passes.base import Pass, PassResult
from qsparse_export.passes.match import STANDARD, replaced

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Decompose(Pass):
    """Replaces the ops named in ``ops`` (joined by +) by the function bodies of their ONNX schemas.

    Before::

        y = RMSNormalization<axis=-1>(x, weight)

    After::

        y = Mul(Cast(Div(x32, Sqrt(Add(ReduceMean(Pow(x32, 2)), epsilon)))), weight)      # and what else the schema writes

    The default is what runtimes without opset 23 lack, and TVM's importer. UsageError for an op that ONNX defines by words
    alone, ExportError for a node that onnx cannot write out.
    """

    name: ClassVar[str] = "decompose"
    ops: str = "Attention+RotaryEmbedding+RMSNormalization"

    def call(self, model: ir.Model) -> PassResult:
        """See :class:`Pass`."""
        import onnx

        opset = model.opset_imports.get("", 23)
        names = self.ops.split("+")
        for op in names:
            if not onnx.defs.has(op):
                raise UsageError(f"decompose: ONNX has no op {op!r}")
            if not onnx.defs.has(op, opset, ""):
                continue  # younger than the graph, which cannot hold it
            schema: Any = onnx.defs.get_schema(op, opset, "")  # onnx's stub lacks the two properties
            if not (schema.has_function or schema.has_context_dependent_function):
                raise UsageError(
                    f"decompose: ONNX defines {op} by words alone; only ops with a function body have a lower form"
                )
        found = [node for node in model.graph if node.op_type in names and node.domain in STANDARD]
        for number, node in enumerate(found):
            _replace(model.graph, node, opset, f"{node.op_type}.{number}")
        return PassResult(model, bool(found))


def _replace(graph: ir.Graph, node: ir.Node, opset: int, label: str) -> None:
    import onnx
    import onnx.inliner

    inputs = {f"in{i}": value for i, value in enumerate(node.inputs) if value is not None}
    copy = onnx.helper.make_node(
        node.op_type,
        [f"in{i}" if value is not None else "" for i, value in enumerate(node.inputs)],
        [f"out{i}" if output.name else "" for i, output in enumerate(node.outputs)],
    )
    copy.attribute.extend(ir.to_proto(attribute) for attribute in node.attributes.values())
    one = onnx.helper.make_graph(
        [copy], label, [_info(n, v) for n, v in inputs.items()], [_info(copy.output[0], node.outputs[0])]
    )
    made = onnx.helper.make_model(one, opset_imports=[onnx.helper.make_opsetid("", opset)])
    try:
        inlined = onnx.inliner.inline_selected_functions(made, [("", node.op_type)], inline_schema_functions=True)
    except (
        RuntimeError
    ) as error:  # onnx 1.23: where an optional input in the middle is left out, or a type is not known
        raise ExportError(f"decompose: onnx cannot write out {node.op_type} {node.outputs[0].name}: {error}") from error
    lowered = ir.from_proto(inlined).graph
    scope = node.metadata_props.get(SCOPE)
    outputs = {value.name: value for inner in lowered for value in inner.outputs}
    for given in lowered.inputs:
        given.replace_all_uses_with(inputs[str(given.name)])
    nodes = list(lowered)
    lowered.outputs.clear()
    lowered.remove(nodes)
    for inner in nodes:
        if scope:
            inner.metadata_props[SCOPE] = scope
        for value in inner.outputs:
            value.name = f"{label}.{value.name}" if value.name else value.name
    graph.insert_before(node, nodes)
    for i, old in enumerate(node.outputs):
        if f"out{i}" in outputs:
            replaced(old, outputs[f"out{i}"])
    graph.remove(node, safe=True)


def _info(name: str, value: ir.Value) -> onnx.ValueInfoProto:
    import onnx

    shape = None if value.shape is None else [dim if isinstance(dim, int) else str(dim) for dim in value.shape]
    assert value.dtype is not None
    return onnx.helper.make_tensor_value_info(name, int(value.dtype), shape)
