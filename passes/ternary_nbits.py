"""Ternary products as ONNX Runtime's MatMulNBits of 2 bits: packed in memory, fast, and not exact."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qsparse_export.formats.ternary import row_bytes, unpack
from qsparse_export.passes.annotate_scope import SCOPE
from qsparse_export.passes.match import drop_unused, is_op, replaced

DOMAIN = "ai.qsparse"
BLOCK = 128
BITS = 2
ZERO_POINT = 2
"""MatMulNBits' own for 2 bits: the codes of -1, 0 and 1 are 1, 2 and 3."""


def lower_to_nbits(model: ir.Model) -> None:
    """Replaces TernaryMatMul and SparseTernaryMatMul whose weights are initialisers; masks become TopKSparsify again."""
    graph = model.graph
    for node in list(graph):
        if not (is_op(node, "TernaryMatMul", DOMAIN) or is_op(node, "SparseTernaryMatMul", DOMAIN)):
            continue
        packed, scales = node.inputs[1], node.inputs[2]
        if packed is None or packed.const_value is None or scales is None or scales.const_value is None:
            continue
        x = node.inputs[0]
        assert x is not None and packed.shape is not None
        metadata = {SCOPE: node.metadata_props[SCOPE]} if SCOPE in node.metadata_props else None
        outputs = (
            [node.attributes["n"].as_int()] if node.op_type == "TernaryMatMul" else list(node.attributes["n"].as_ints())
        )
        width = packed.shape[0]
        assert isinstance(width, int)
        if node.op_type == "SparseTernaryMatMul":
            x = _masked(graph, node, x, width)
        codes, factors = _weights(packed.const_value, scales.const_value, outputs, width, x.dtype)
        operands = [
            _initializer(graph, f"{packed.name}.nbits", codes),
            _initializer(graph, f"{packed.name}.scales", factors),
        ]
        made = ir.node(
            "MatMulNBits",
            [x, *operands],
            attributes={"K": width, "N": sum(outputs), "bits": BITS, "block_size": BLOCK, "accuracy_level": 4},
            domain="com.microsoft",
            metadata_props=metadata,
        )
        graph.insert_before(node, made)
        replaced(node.outputs[0], made.outputs[0])
        graph.remove(node, safe=True)
        drop_unused(graph, (packed, scales))
        model.opset_imports.setdefault("com.microsoft", 1)


def _masked(graph: ir.Graph, node: ir.Node, x: ir.Value, width: int) -> ir.Value:
    attributes = {name: node.attributes[name] for name in ("k", "block", "rescale")}
    k, block = attributes["k"].as_int(), attributes["block"].as_int()
    if k == (block or width) and attributes["rescale"].as_string() == "none":
        return x
    mask = ir.Node(DOMAIN, "TopKSparsify", [x], list(attributes.values()), metadata_props=dict(node.metadata_props))
    masked = mask.outputs[0]
    masked.name, masked.type, masked.shape = f"{node.outputs[0].name}.masked", x.type, x.shape
    graph.insert_before(node, mask)
    return masked


def _weights(
    packed: ir.TensorProtocol, scales: ir.TensorProtocol, outputs: list[int], width: int, dtype: ir.DataType | None
) -> tuple[ir.LazyTensor, ir.LazyTensor]:
    """uint8 [N, blocks, BLOCK / 4] and ``dtype`` [N * blocks], both made when they are read."""
    blocks = -(-width // BLOCK)

    def codes() -> ir.TensorProtocol:
        bytes_, parts, at = packed.numpy(), [], 0
        for n in outputs:
            parts.append(unpack(np.ascontiguousarray(bytes_[:, at : at + row_bytes(n)]), n))
            at += row_bytes(n)
        padded = np.full((sum(outputs), blocks * BLOCK), ZERO_POINT, np.uint8)
        padded[:, :width] = np.concatenate(parts) + ZERO_POINT
        quads = padded.reshape(sum(outputs), blocks, BLOCK // 4, 4)
        return ir.tensor(quads[..., 0] | quads[..., 1] << 2 | quads[..., 2] << 4 | quads[..., 3] << 6)

    def factors() -> ir.TensorProtocol:
        each = np.repeat(scales.numpy().astype(np.float32).reshape(-1), outputs)
        return ir.tensor(np.repeat(each, blocks).astype(np.float16 if dtype == ir.DataType.FLOAT16 else np.float32))

    kind = dtype if dtype == ir.DataType.FLOAT16 else ir.DataType.FLOAT
    return (
        ir.LazyTensor(codes, dtype=ir.DataType.UINT8, shape=ir.Shape([sum(outputs), blocks, BLOCK // 4]), cache=False),
        ir.LazyTensor(factors, dtype=kind, shape=ir.Shape([sum(outputs) * blocks]), cache=False),
    )


def _initializer(graph: ir.Graph, name: str, tensor: ir.LazyTensor) -> ir.Value:
    tensor.name = name
    value = ir.Value(
        name=name, const_value=tensor, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype)
    )
    graph.register_initializer(value)
    return value
