"""An ONNX graph -> a Relax module, by TVM's importer with our converters beside its own."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from tvm import relax
from tvm.relax.frontend.onnx import onnx_frontend

from qsparse_export.errors import ExportError, QSparseError
from qsparse_export.runtimes.tvm.converters import Converters
from qsparse_export.runtimes.tvm.kernel_set import KernelSet
from qsparse_export.runtimes.tvm.weights import Weight


def imported(rest: onnx.ModelProto, weights: tuple[Weight, ...], kernels: KernelSet) -> Any:
    """``rest`` as an IRModule whose function ``main`` takes the graph's inputs and then ``weights``.

    ``kernels`` are those of the device.

    Raises ExportError, with what TVM says, for a graph that its importer does not take.
    """
    model = onnx.ModelProto()
    model.CopyFrom(rest)
    stored = {weight.name for weight in weights}
    constants = [tensor for tensor in model.graph.initializer if tensor.name not in stored]
    del model.graph.initializer[:]
    model.graph.initializer.extend(constants)
    for weight in weights:
        element = onnx.helper.np_dtype_to_tensor_dtype(weight.numpy_dtype)
        model.graph.input.append(onnx.helper.make_tensor_value_info(weight.name, element, weight.shape))
    _make_initialisers(model.graph)
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    converters = Converters(kernels, onnx_frontend._get_convert_map(), opset)
    try:
        with _converters(converters.table()), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about names of inputs, and ops that onnx does not know
            module = onnx_frontend.ONNXGraphImporter({}, "float32").from_onnx(model.graph, opset)
    except QSparseError:
        raise
    except Exception as error:  # the importer raises whatever its converters do, for graphs that they do not take
        raise ExportError(
            f"TVM's importer does not take the graph: {error}; export with --runtime ort, or with the passes that fuse "
            "what it lacks (--passes default)"
        ) from error
    return relax.transform.DeadCodeElimination(["main"])(module)


def _make_initialisers(graph: onnx.GraphProto) -> None:
    """Constants as initialisers: the importer reads tensors in them alone, no ``value_ints`` and its like."""
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
            graph.node.append(node)
            continue
        attribute = node.attribute[0]
        value = onnx.helper.get_attribute_value(attribute)
        if attribute.name == "value":
            tensor = onnx.TensorProto()
            tensor.CopyFrom(value)
            tensor.name = node.output[0]
        else:
            dtype = np.float32 if attribute.name.startswith("value_float") else np.int64
            tensor = onnx.numpy_helper.from_array(np.array(value, dtype), node.output[0])
        graph.initializer.append(tensor)


@contextlib.contextmanager
def _converters(table: dict[str, Any]) -> Iterator[None]:
    """While active, the importer knows ``table`` instead of its own converters, which it looks up anew for each node."""
    own = onnx_frontend._get_convert_map
    onnx_frontend._get_convert_map = lambda: table
    try:
        yield
    finally:
        onnx_frontend._get_convert_map = own
