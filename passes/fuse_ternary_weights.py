"""Ternary weights as other exporters store them: any constant matrix that comes out as -a, 0 and a, however it is computed.

What computes it (unpacking of bits, quantisation of master weights) is cut out of the graph and run by ONNX Runtime, as the
original file's own session would fold it: another mean(abs(W)), different in its last bit, would flip single weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qsparse_export.errors import ExportError
from qsparse_export.formats.ternary import pack, row_bytes
from qsparse_export.passes.fuse_topk_masks import produced_by

NEAR = 2.0**-20
"""How far from -a, 0 and a a weight may lie, in units of a: a straight-through sum w + (Qw(w) - w) rounds a few times."""
_MOST_NODES = 256


@dataclass(frozen=True)
class ConstantMatrix:
    """A value that depends on initialisers only: a model without inputs whose one output it is, and where it comes from.

    ``source`` is the name of the largest initialiser in it. ``transposed`` when it is used as its transpose.
    """

    model: ir.Model
    source: str
    transposed: bool = False

    def read(self) -> np.ndarray:
        """Computes the value, transposed where it is used so; ExportError when ONNX Runtime cannot."""
        computed = self._computed()
        return computed.T if self.transposed else computed

    def _computed(self) -> np.ndarray:
        output = self.model.graph.outputs[0]
        if output.const_value is not None:
            return output.const_value.numpy()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            plain = ir.to_proto(self.model).SerializeToString()
            session = onnxruntime.InferenceSession(plain, options, providers=["CPUExecutionProvider"])
            return session.run(None, {})[0]
        except Exception as error:  # onnxruntime raises a class per status code, without a common base of their own
            raise ExportError(f"the constant {output.name} of the model cannot be computed: {error}") from error


@dataclass(frozen=True)
class Ternary:
    """A matrix ``amplitude * values``: int8 [N, K] of -1, 0, 1."""

    values: np.ndarray
    amplitude: float


def constant_matrix(value: ir.Value, *, transposed: bool = False) -> ConstantMatrix | None:
    """``value`` cut out of its graph, None when it depends on an input. Weights stay where they are, unread.

    A straight-through sum w + (Qw - w) is taken for Qw, which it is up to rounding.
    """
    copies: dict[ir.Value, ir.Value] = {}
    nodes: list[ir.Node] = []
    initializers: dict[str, ir.Value] = {}

    def copy(value: ir.Value) -> ir.Value | None:
        value = _quantised_weight(value)
        if value in copies:
            return copies[value]
        if value.const_value is not None and value.producer() is None and not value.is_graph_input():
            made = ir.Value(name=value.name, const_value=value.const_value, shape=value.shape, type=value.type)
            initializers[str(value.name)] = copies[value] = made
            return made
        node = value.producer()
        if node is None or node.domain != "" or len(nodes) >= _MOST_NODES or _has_graphs(node):
            return None
        inputs: list[ir.Value | None] = []
        for operand in node.inputs:
            copied = None if operand is None else copy(operand)
            if operand is not None and copied is None:
                return None
            inputs.append(copied)
        cloned = ir.Node(
            node.domain,
            node.op_type,
            inputs,
            list(node.attributes.values()),
            num_outputs=len(node.outputs),
        )
        for old, new in zip(node.outputs, cloned.outputs, strict=True):
            new.name, new.type, new.shape = old.name, old.type, old.shape
            copies[old] = new
        nodes.append(cloned)
        return copies[value]

    output = copy(value)
    if output is None:
        return None
    producer = value.producer()
    opset = producer.graph.opset_imports if producer is not None and isinstance(producer.graph, ir.Graph) else {"": 23}
    graph = ir.Graph(
        [],
        [output],
        nodes=nodes,
        initializers=list(initializers.values()),
        opset_imports={"": opset[""]},
        name="constant",
    )
    largest = max(initializers.values(), key=_elements_of, default=output)
    return ConstantMatrix(ir.Model(graph, ir_version=11), str(largest.name), transposed)


def _elements_of(value: ir.Value) -> int:
    return value.const_value.size if value.const_value is not None else 0


def _has_graphs(node: ir.Node) -> bool:
    return any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())


def _quantised_weight(value: ir.Value) -> ir.Value:
    """Qw where ``value`` is w + (Qw - w) of a constant w."""
    node = produced_by(value, "Add")
    if node is None:
        return value
    for w, difference in (node.inputs, node.inputs[::-1]):
        sub = produced_by(difference, "Sub")
        if sub is not None and sub.inputs[1] is w and sub.inputs[0] is not None and sub.inputs[0] is not w:
            return sub.inputs[0]
    return value


def ternary_of(matrix: np.ndarray) -> Ternary | str:
    """The ternary form of a floating-point or integer [K, N] matrix as it is multiplied from the right, or why it has none."""
    if matrix.ndim != 2 or matrix.dtype == object:
        return f"the weights are {list(matrix.shape)}; expected a matrix"
    wide = np.ascontiguousarray(matrix.T, np.float32)
    magnitude = np.abs(wide)
    largest = float(magnitude.max(initial=0.0))
    if not np.isfinite(largest):
        return "the weights hold NaN or infinities"
    if largest == 0.0:
        return Ternary(np.zeros(wide.shape, np.int8), 1.0)
    nonzero = magnitude[magnitude > 0.5 * largest]
    amplitude = largest if nonzero.min() == largest else float(np.median(nonzero))
    values = np.clip(np.rint(wide / np.float32(amplitude)), -1, 1)
    if float(np.abs(wide - values * np.float32(amplitude)).max()) > NEAR * amplitude:
        return "the weights are not -a, 0 and a: three values of one magnitude"
    return Ternary(values.astype(np.int8), amplitude)


def packed_initializer(matrix: ConstantMatrix, name: str, n: int, k: int) -> ir.Value:
    """The packed weights as an initialiser that is computed and packed again when the file is written."""

    def read() -> ir.TensorProtocol:
        found = ternary_of(matrix.read())
        if isinstance(found, str):
            raise ExportError(f"{name}: {found}; the file changed while it was read")
        return ir.Tensor(pack(found.values), name=name)

    shape = ir.Shape((k, row_bytes(n)))
    lazy = ir.LazyTensor(read, dtype=ir.DataType.UINT8, shape=shape, cache=False, name=name)
    return ir.Value(
        name=name, const_value=lazy, shape=ir.Shape((k, row_bytes(n))), type=ir.TensorType(ir.DataType.UINT8)
    )
