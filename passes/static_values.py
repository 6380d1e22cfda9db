"""Elements of small values that are known when a graph is compiled: constants, and arithmetic on static dimensions.

Folding computes a node only when all of its inputs are known. ``Gather(Shape(x), 2)`` is known also where only dimension 2
of x is, which is how exporters spell ``k = int((1 - ratio) * x.shape[-1])`` of a model with dynamic batch and sequence.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

MOST_CONSTANT_BYTES = 1 << 24  # masks and zeros are as large as activations, not as weights
_DEEPEST = 24
_ARITHMETIC: dict[str, Callable[..., np.ndarray]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Min": np.minimum,
    "Max": np.maximum,
    "Floor": np.floor,
    "Ceil": np.ceil,
    "Neg": np.negative,
}
_RESHAPING = ("Identity", "Unsqueeze", "Squeeze", "Reshape")


def elements(value: ir.Value | None) -> np.ndarray | None:
    """The elements of ``value``, in its shape as far as that matters, or None when they are not all known."""
    if value is None:
        return None
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is not None:
        too_large = tensor.dtype == ir.DataType.STRING or tensor.nbytes > MOST_CONSTANT_BYTES
        return None if too_large else tensor.numpy()
    known = _partly(value, _DEEPEST, {})
    if known is None or any(element is None for element in known.flat):
        return None
    dtype = value.dtype.numpy() if value.dtype is not None else np.int64
    return known.astype(dtype)


def scalar(value: ir.Value | None) -> float | None:
    """The one element of ``value``, or None."""
    known = elements(value)
    return float(known.item()) if known is not None and known.size == 1 else None


def _partly(value: ir.Value | None, depth: int, seen: dict[int, np.ndarray | None]) -> np.ndarray | None:
    """Elements as Python numbers in an object array, None for each that is not known; None for a value of another kind."""
    if value is None or depth == 0:
        return None
    if id(value) not in seen:
        seen[id(value)] = _evaluated(value, depth, seen)
    return seen[id(value)]


def _evaluated(value: ir.Value, depth: int, seen: dict[int, np.ndarray | None]) -> np.ndarray | None:
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is not None:
        return tensor.numpy().astype(object) if tensor.dtype != ir.DataType.STRING and tensor.size <= 64 else None
    node = value.producer()
    if node is None or node.domain != "":
        return None
    if node.op_type == "Shape":
        return _shape(node)
    given = []
    for operand in node.inputs[: 1 if node.op_type in _RESHAPING else None]:
        known = _partly(operand, depth - 1, seen)
        if known is None:
            return None
        given.append(known)
    if not given:
        return None
    if node.op_type in _RESHAPING:
        # The number of axes does not matter here: what is read in the end are dimensions and k, one element each.
        return given[0].reshape(()) if node.op_type == "Squeeze" and given[0].size == 1 else given[0].reshape(-1)
    if node.op_type == "Concat":
        return np.concatenate([operand.reshape(-1) for operand in given])
    if node.op_type == "Gather" and len(given) == 2:
        return _gathered(node, *given)
    return _computed(node, given)


def _shape(node: ir.Node) -> np.ndarray | None:
    source = node.inputs[0]
    if source is None or source.shape is None:
        return None
    dims = [dim if isinstance(dim, int) else None for dim in source.shape.dims]
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(dims))
    known = dims[start:end]
    array = np.empty(len(known), object)
    array[:] = known
    return array


def _gathered(node: ir.Node, data: np.ndarray, indices: np.ndarray) -> np.ndarray | None:
    if node.attributes.get_int("axis", 0) != 0 or data.ndim != 1:
        return None
    try:
        return np.asarray(data[indices.astype(np.int64)], object)
    except (IndexError, TypeError):
        return None


def _computed(node: ir.Node, inputs: list[np.ndarray]) -> np.ndarray | None:
    """Arithmetic in the type that the graph computes in: float32 and float64 give other k."""
    if any(element is None for operand in inputs for element in operand.flat):
        return None
    dtype = node.inputs[0].dtype if node.inputs[0] is not None else None
    if dtype is None:
        return None
    typed = [operand.astype(dtype.numpy()) for operand in inputs]
    if node.op_type == "Cast":
        target = ir.DataType(node.attributes["to"].as_int()).numpy()
        return typed[0].astype(target).astype(object)
    if node.op_type == "Div":
        whole = np.issubdtype(typed[0].dtype, np.integer)
        if whole:  # ONNX truncates towards zero
            quotient = np.trunc(typed[0] / np.where(typed[1] == 0, 1, typed[1])).astype(typed[0].dtype)
            return None if (typed[1] == 0).any() else quotient.astype(object)
        return np.asarray(typed[0] / typed[1]).astype(object)
    if node.op_type not in _ARITHMETIC:
        return None
    return np.asarray(_ARITHMETIC[node.op_type](*typed)).astype(object)
