"""Small graphs written as text, and what they compute on ONNX Runtime: for the tests of passes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from qsparse_export import ops
from qsparse_export.passes.lower_attach_bodies import AttachBodies
from qsparse_export.runtimes.ort.library import library_path

OPSETS = '["" : 23, "ai.qsparse" : 1, "com.microsoft" : 1]'


def graph_of(signature: str, text: str, initializers: Mapping[str, np.ndarray] | None = None) -> ir.Model:
    """``g SIGNATURE { TEXT }`` in ONNX's text form, with shapes inferred; shapes of initialisers come from their arrays."""
    ops.register()
    made = onnx.parser.parse_model(f"<ir_version: 11, opset_import: {OPSETS}> g {signature} {{ {text} }}")
    given = initializers or {}
    made.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in given.items())
    return ir.from_proto(onnx.shape_inference.infer_shapes(made, strict_mode=True, data_prop=True))


def kinds(graph: ir.Model) -> list[str]:
    """The ops in the order of the graph."""
    return [node.op_type for node in graph.graph]


def spelled(graph: ir.Model) -> bytes:
    """The file that the graph makes."""
    return ir.to_proto(graph).SerializeToString()


def run(graph: ir.Model, feeds: Mapping[str, np.ndarray], native: bool) -> list[np.ndarray]:
    """The outputs on ONNX Runtime, with our kernels or the function bodies; the graph is checked first."""
    AttachBodies()(graph)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if native:
        options.register_custom_ops_library(str(library_path()))
    made = ir.to_proto(graph)
    onnx.checker.check_model(made, full_check=True)
    session = onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(feeds))
