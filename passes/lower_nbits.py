"""Lowers the n-bit head and embedding to ONNX Runtime's own ops, for providers that have kernels for those alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qsparse_export.passes.annotate_scope import SCOPE
from qsparse_export.passes.base import Pass, PassResult
from qsparse_export.passes.match import drop_unused, is_op, replaced

DOMAIN = "ai.qsparse"
CONTRIB = "com.microsoft"
OPS = {"DenseMatMulNBits": (1, 2), "GatherNBits": (1, 2)}
"""Our ops, and which of their inputs are codes and scales."""

GROUPS = frozenset({16, 32, 64, 128, 256})  # of the kernels of MatMulNBits


@dataclass(frozen=True)
class LowerNBits(Pass):
    """Makes com.microsoft's MatMulNBits and GatherBlockQuantized of DenseMatMulNBits and GatherNBits, on the same bytes.

    Before::

        e = GatherNBits<k, bits, group>(ids, w, scales); y = DenseMatMulNBits<n, k, bits, group>(x, w, scales)

    After::

        e = GatherBlockQuantized<bits, block_size>(Reshape(w3, [0, -1]), ids, scales)
        y = MatMulNBits<K, N, bits, block_size, accuracy_level=1>(x, w3, scales)       # w3: w as [n, groups, bytes of a group]

    Codes lie in the file as ONNX Runtime wants them, lowest bits first and plus 2^(bits - 1), which it subtracts where no zero
    point is given. Not lowered: groups that are not a power of two from 16 to 256, and a last group that is shorter. A row
    of activations that holds an infinity gives what the products give, and not NaN throughout.
    """

    name: ClassVar[str] = "lower-nbits"

    def call(self, model: ir.Model) -> PassResult:
        """See :class:`Pass`."""
        shared: dict[int, ir.Value] = {}
        modified = False
        for node in list(model.graph):
            if not explain(node):
                _rewrite(model.graph, node, shared)
                modified = True
        if modified:
            model.opset_imports.setdefault(CONTRIB, 1)
        return PassResult(model, modified)


def explain(node: ir.Node) -> str:
    """Why ``node`` is not lowered, or "" where it is."""
    if node.domain != DOMAIN or node.op_type not in OPS:
        return "neither the head nor the embedding"
    codes, scales = (node.inputs[i] for i in OPS[node.op_type])
    if codes is None or scales is None or codes.const_value is None or scales.const_value is None:
        return "the weights are computed"
    k, group = (node.attributes[name].as_int() for name in ("k", "group"))
    if group not in GROUPS:
        return f"groups of {group}, and ONNX Runtime takes {', '.join(map(str, sorted(GROUPS)))}"
    return f"{k} inputs are no whole number of groups of {group}" if k % group else ""


def _rewrite(graph: ir.Graph, node: ir.Node, shared: dict[int, ir.Value]) -> None:
    attributes = {name: attribute.as_int() for name, attribute in node.attributes.items()}
    bits, group = attributes["bits"], attributes["group"]
    codes, scales = (node.inputs[i] for i in OPS[node.op_type])
    assert codes is not None and scales is not None
    blocks = _blocks(graph, codes, group * bits // 8, shared)
    scope = node.metadata_props.get(SCOPE)
    metadata = {SCOPE: scope} if scope else {}
    if node.op_type == "DenseMatMulNBits":
        options = {"K": attributes["k"], "N": attributes["n"], "bits": bits, "block_size": group, "accuracy_level": 1}
        x = node.inputs[0]
        assert x is not None
        scales_of_x = scales if x.dtype == ir.DataType.FLOAT16 else _wide(graph, scales, shared)
        made = [ir.node("MatMulNBits", [x, blocks, scales_of_x], options, domain=CONTRIB, metadata_props=metadata)]
        stood_for = node
    else:
        reader = _sole_narrowing(node.outputs[0])
        options = {"bits": bits, "block_size": group, "gather_axis": 0, "quantize_axis": 1}
        rows = ir.node("Reshape", [blocks, _rows_shape(graph, blocks, shared)], metadata_props=dict(metadata))
        rows.outputs[0].name = f"{node.outputs[0].name}.rows"
        operands = [rows.outputs[0], node.inputs[0], scales if reader else _wide(graph, scales, shared)]
        gather = ir.node("GatherBlockQuantized", operands, options, domain=CONTRIB, metadata_props=metadata)
        made = [rows, gather]
        stood_for = reader or node
    graph.insert_before(node, made)
    replaced(stood_for.outputs[0], made[-1].outputs[0])
    graph.remove([stood_for, node] if stood_for is not node else [node], safe=True)
    drop_unused(graph, (codes, scales))


def _sole_narrowing(value: ir.Value) -> ir.Node | None:
    """The Cast to float16 that alone reads ``value``: it rounds what GatherBlockQuantized rounds with float16 scales."""
    readers = [use.node for use in value.uses()]
    is_narrowed = len(readers) == 1 and is_op(readers[0], "Cast") and not value.is_graph_output()
    return readers[0] if is_narrowed and readers[0].outputs[0].dtype == ir.DataType.FLOAT16 else None


def _blocks(graph: ir.Graph, codes: ir.Value, block_bytes: int, shared: dict[int, ir.Value]) -> ir.Value:
    """``codes`` uint8 [n, bytes of a row] as [n, groups, bytes of a group]: the same bytes, converted when they are read."""
    if id(codes) not in shared:
        tensor = codes.const_value
        assert tensor is not None
        n, row_bytes = (int(dim) for dim in tensor.shape.numpy())
        shape = (n, row_bytes // block_bytes, block_bytes)

        def read() -> ir.TensorProtocol:
            return ir.Tensor(tensor.numpy().reshape(shape), name=f"{codes.name}.blocks")

        shared[id(codes)] = _lazy(graph, f"{codes.name}.blocks", ir.DataType.UINT8, shape, read)
    return shared[id(codes)]


def _wide(graph: ir.Graph, scales: ir.Value, shared: dict[int, ir.Value]) -> ir.Value:
    """float16 ``scales`` in float32, beside float32 activations."""
    if id(scales) not in shared:
        tensor = scales.const_value
        assert tensor is not None

        def read() -> ir.TensorProtocol:
            return ir.Tensor(tensor.numpy().astype(np.float32), name=f"{scales.name}.float")

        shape = tuple(int(dim) for dim in tensor.shape.numpy())
        shared[id(scales)] = _lazy(graph, f"{scales.name}.float", ir.DataType.FLOAT, shape, read)
    return shared[id(scales)]


def _lazy(
    graph: ir.Graph, name: str, dtype: ir.DataType, shape: tuple[int, ...], read: Callable[[], ir.TensorProtocol]
) -> ir.Value:
    tensor = ir.LazyTensor(read, dtype=dtype, shape=ir.Shape(shape), cache=False, name=name)
    value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(dtype), shape=ir.Shape(shape))
    graph.register_initializer(value)
    return value


def _rows_shape(graph: ir.Graph, blocks: ir.Value, shared: dict[int, ir.Value]) -> ir.Value:
    if id(blocks) not in shared:
        name = f"{blocks.name}.rows"
        tensor = ir.tensor(np.array([0, -1], np.int64), name=name)
        value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([2]))
        graph.register_initializer(value)
        shared[id(blocks)] = value
    return shared[id(blocks)]
