"""Lowers a float32 graph to float16, with float32 where float16 ends: angles, squared products, and what sums them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qsparse_export.errors import ExportError
from qsparse_export.passes.annotate_scope import SCOPE
from qsparse_export.passes.base import Pass, PassResult
from qsparse_export.passes.match import is_op
from qsparse_export.passes.row_scale import DOMAIN, is_square, rescale_rows, squared_product

ANGLES = ("Cos", "Sin")
WIDE = frozenset({"Cos", "Sin", "Softmax", "ScatterElements", "ScatterND"})
"""Ops that stay float32: positions beyond 2048 and sums over many rows are not float16, and ONNX Runtime's CPU adds none."""


CARRIES_CHANCES = frozenset(
    {"TopK", "ReduceSum", "Div", "ScatterElements", "Split", "SplitToSequence", "Squeeze", "Unsqueeze", "Gather", "Mul"}
)
"""Ops behind a Softmax that a router is made of: its chances stay float32 until they have weighed the experts' outputs."""

GIVES_FLOAT = frozenset({"GatedActivation", "GatherNBits"})
"""Our ops whose result is float32 whatever they read."""

SCALES = {"TernaryMatMul": (2,), "SparseTernaryMatMul": (2,)}
"""Inputs that our ops take in float32 whatever the type of the others."""


@dataclass(frozen=True)
class Float16(Pass):
    """Makes inputs, weights and outputs float16; computes in float32 what leaves its range or needs its precision.

    Before::

        r = Relu(gate); p = Mul(Pow(r, 2), up); y = MatMul(p, weight)                        # all float32

    After::

        p = Mul(Pow(Relu(Cast<float>(gate)), 2), Cast<float>(up))                            # float32: 300^2 overflows float16
        m = Max(ReduceMax(Abs(p)), 1e-30); h = Cast<float16>(Div(p, m))                      # top-k and int8 ignore the scale
        y = Cast<float16>(Mul(Cast<float>(MatMul(h, weight16)), m))

    Where an RMS norm reads the product, the norm alone is computed in float32. Weights stay lazy. A product whose reader is
    neither is refused: dividing it by its row's maximum would change what is computed.
    """

    name: ClassVar[str] = "float16"

    def call(self, model: ir.Model) -> PassResult:
        """See :class:`Pass`; ExportError for graphs with branches or function bodies."""
        graph = model.graph
        if not any(v.dtype == ir.DataType.FLOAT for v in (*graph.inputs, *graph.outputs)):
            return PassResult(model, False)
        if model.functions or any(_has_subgraph(node) for node in graph):
            raise ExportError("float16: the graph has function bodies or branches; run this pass before attach-bodies")
        wide = _wide_nodes(graph)
        products = [product for node in graph if (product := squared_product(node)) is not None]
        for product in products:
            wide |= {id(node) for node in rescale_rows(graph, product)}
            wide |= {id(use.node) for use in product.uses() if is_op(use.node, "RMSNormalization")}
        _Narrowing(graph, wide).run()
        return PassResult(model, True)


def _has_subgraph(node: ir.Node) -> bool:
    return any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())


def _wide_nodes(graph: ir.Graph) -> set[int]:
    """Ids of the nodes of the original graph that compute in float32."""
    wide = {id(node) for node in graph if node.op_type in WIDE}
    before = [value for node in graph if node.op_type in ANGLES for value in node.inputs]
    while before:  # everything that leads to an angle
        value = before.pop()
        node = value.producer() if value is not None else None
        if node is not None and id(node) not in wide and node.outputs[0].dtype == ir.DataType.FLOAT:
            wide.add(id(node))
            before.extend(node.inputs)
    after = [node for node in graph if is_op(node, "Softmax")]
    while after:
        reads = [use.node for value in after.pop().outputs for use in value.uses()]
        found = [node for node in reads if node.op_type in CARRIES_CHANCES and id(node) not in wide]
        wide |= {id(node) for node in found}
        after.extend(node for node in found if not is_op(node, "Mul"))
        after.extend(node for node in reads if is_op(node, "ScatterElements") and "reduction" not in node.attributes)
    for node in graph:
        if squared_product(node) is not None and is_op(node, "Mul"):
            wide.add(id(node))
            for factor in node.inputs:
                square = factor.producer() if factor is not None else None
                if square is not None and is_square(factor):
                    relu = square.inputs[0].producer() if square.inputs[0] is not None else None
                    wide |= {id(square), *([id(relu)] if is_op(relu, "Relu") else [])}
    return wide


class _Narrowing:
    """Gives every float32 value of ``graph`` its new type and puts Casts where a reader needs the other one."""

    def __init__(self, graph: ir.Graph, wide: set[int]) -> None:
        self._graph = graph
        self._wide = wide
        self._casts: dict[tuple[int, ir.DataType], ir.Value] = {}

    def run(self) -> None:
        floats = [v for v in (*self._graph.inputs, *self._graph.initializers.values()) if v.dtype == ir.DataType.FLOAT]
        nodes = list(self._graph)
        produced = [v for node in nodes for v in node.outputs if v.dtype == ir.DataType.FLOAT]
        for value in floats:
            if value.is_graph_input() or not self._is_only_read_wide(value):
                self._narrow(value)
        for value in produced:
            node = value.producer()
            assert node is not None
            if id(node) not in self._wide and not (node.domain == DOMAIN and node.op_type in GIVES_FLOAT):
                value.type = ir.TensorType(ir.DataType.FLOAT16)
                _narrow_attributes(node)
        for node in nodes:
            for position, operand in enumerate(node.inputs):
                if (
                    operand is not None
                    and operand.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16)
                    and not is_op(node, "Cast")
                ):
                    wanted = self._wanted(node, position)
                    if operand.dtype != wanted:
                        node.replace_input_with(position, self._cast(operand, wanted, node))
        for position, output in enumerate(self._graph.outputs):
            if output.dtype == ir.DataType.FLOAT:
                self._graph.outputs[position] = self._narrowed_output(output)

    def _wanted(self, node: ir.Node, position: int) -> ir.DataType:
        is_scale = node.domain == DOMAIN and position in SCALES.get(node.op_type, ())
        return ir.DataType.FLOAT if id(node) in self._wide or is_scale else ir.DataType.FLOAT16

    def _is_only_read_wide(self, value: ir.Value) -> bool:
        uses = list(value.uses())
        return bool(uses) and all(self._wanted(use.node, use.idx) == ir.DataType.FLOAT for use in uses)

    def _narrow(self, value: ir.Value) -> None:
        value.type = ir.TensorType(ir.DataType.FLOAT16)
        if value.const_value is not None:
            value.const_value = _narrow_tensor(value.const_value)

    def _cast(self, value: ir.Value, to: ir.DataType, before: ir.Node) -> ir.Value:
        key = (id(value), to)
        if key not in self._casts:
            producer = value.producer()
            scope = (producer or before).metadata_props.get(SCOPE)
            node = ir.node(
                "Cast", [value], attributes={"to": int(to)}, metadata_props={SCOPE: scope} if scope else None
            )
            made = node.outputs[0]
            made.name, made.type, made.shape = f"{value.name}.{to.name.lower()}", ir.TensorType(to), value.shape
            if producer is not None:
                self._graph.insert_after(producer, node)
            else:
                self._graph.insert_before(self._graph[0], node)
            self._casts[key] = made
        return self._casts[key]

    def _narrowed_output(self, output: ir.Value) -> ir.Value:
        name, producer = output.name, output.producer()
        assert producer is not None
        made = self._cast(output, ir.DataType.FLOAT16, producer)
        output.name, made.name = f"{name}.wide", name
        return made


def _narrow_tensor(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """``tensor`` as float16, converted when it is read."""

    def read() -> ir.TensorProtocol:
        return ir.Tensor(tensor.numpy().astype(np.float16), name=tensor.name)

    return ir.LazyTensor(
        read, dtype=ir.DataType.FLOAT16, shape=ir.Shape(tensor.shape.numpy()), cache=False, name=tensor.name
    )


def _narrow_attributes(node: ir.Node) -> None:
    """What says float32 in the attributes of a node that makes float16."""
    attributes = node.attributes
    if is_op(node, "Cast") and attributes["to"].as_int() == ir.DataType.FLOAT:
        attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT16))
    if node.op_type in ("Constant", "ConstantOfShape") and "value" in attributes:
        tensor = attributes["value"].as_tensor()
        attributes["value"] = ir.AttrTensor("value", ir.tensor(tensor.numpy().astype(np.float16), name=tensor.name))
    for name in ("value_float", "value_floats"):
        if name in attributes:
            array = np.array(attributes.pop(name).value, np.float16)
            attributes["value"] = ir.AttrTensor("value", ir.tensor(array))
