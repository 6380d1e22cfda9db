"""Carries a row's scale around what does not care for it, so that a squared product fits into float16."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qsparse_export.errors import ExportError
from qsparse_export.passes.annotate_scope import SCOPE
from qsparse_export.passes.match import is_op, scalar

DOMAIN = "ai.qsparse"
PRODUCTS = frozenset({"MatMul", "TernaryMatMul", "SparseTernaryMatMul", "SparseMatMul", "SparseMatMulNBits"})
SMALLEST_ROW_MAX = 1e-30
"""Floor of the row maximum that products are divided by: far below anything that float16 can tell from 0."""


def squared_product(node: ir.Node) -> ir.Value | None:
    """The output of ``node`` when it is a gated square."""
    if is_op(node, "GatedActivation", DOMAIN) and node.attributes["activation"].as_string() == "relu2":
        return node.outputs[0]
    return node.outputs[0] if is_op(node, "Mul") and any(is_square(value) for value in node.inputs) else None


def is_square(value: ir.Value | None) -> bool:
    """Whether ``value`` is the square of another."""
    node = value.producer() if value is not None else None
    if is_op(node, "Pow"):
        return scalar(node.inputs[1]) == 2.0
    return is_op(node, "Mul") and node.inputs[0] is node.inputs[1]


def rescale_rows(graph: ir.Graph, product: ir.Value) -> list[ir.Node]:
    """Divides ``product`` by its rows' largest magnitudes and multiplies what is made of it by them; the nodes that do so.

    Nothing is done where RMS norms alone read it. ExportError when its reader is no product, mask or norm.
    """
    readers = [use.node for use in product.uses()]
    if all(is_op(node, "RMSNormalization") for node in readers):
        return []
    if len(readers) != 1 or product.is_graph_output() or product.shape is None:
        raise ExportError(f"float16: the squared product {product.name} has {len(readers)} readers; expected one")
    reader = readers[0]
    linear, is_rescaled = reader, False
    if is_op(reader, "TopKSparsify", DOMAIN):
        is_rescaled = reader.attributes["rescale"].as_string() == "l2"
        uses = [use.node for use in reader.outputs[0].uses()]
        linear = uses[0] if len(uses) == 1 else reader
    if is_op(linear, "SparseTernaryMatMul", DOMAIN):
        is_rescaled = linear.attributes["rescale"].as_string() == "l2"
    if linear.op_type not in PRODUCTS or linear.domain not in ("", DOMAIN):
        raise ExportError(
            f"float16: the squared product {product.name} is read by {linear.op_type}; expected a norm, a top-k mask or a "
            "matrix product, through which a row's scale can be carried"
        )
    scope = {SCOPE: reader.metadata_props[SCOPE]} if SCOPE in reader.metadata_props else None
    wide = ir.TensorType(ir.DataType.FLOAT)
    column = ir.Shape([*product.shape[:-1], 1])

    nodes: list[ir.Node] = []

    def made(before: ir.Node, op: str, inputs: list[ir.Value], shape: ir.Shape, **attributes: int) -> ir.Value:
        node = ir.node(op, inputs, attributes=attributes, metadata_props=scope)
        value = node.outputs[0]
        value.name, value.type, value.shape = f"{product.name}.{op}", wide, shape
        graph.insert_before(before, node)
        nodes.append(node)
        return value

    axis = _constant(graph, "float16.last_axis", np.array([-1], np.int64))
    floor = _constant(graph, "float16.smallest_row_max", np.array(SMALLEST_ROW_MAX, np.float32))
    magnitude = made(reader, "Abs", [product], product.shape)
    largest = made(reader, "Max", [made(reader, "ReduceMax", [magnitude, axis], column, keepdims=1), floor], column)
    reader.replace_input_with(0, made(reader, "Div", [product, largest], product.shape))
    if is_rescaled:  # then the scale of the row is gone in the original too
        return nodes
    y = linear.outputs[0]
    after = ir.node("Mul", [y, largest], metadata_props=dict(linear.metadata_props))
    y.replace_all_uses_with(after.outputs[0], replace_graph_outputs=True)
    after.replace_input_with(0, y)
    graph.insert_after(linear, after)
    after.outputs[0].name, y.name = y.name, f"{y.name}.of_scaled"
    after.outputs[0].type, after.outputs[0].shape = wide, y.shape
    return [*nodes, after]


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
        graph.register_initializer(value)
    return graph.initializers[name]
