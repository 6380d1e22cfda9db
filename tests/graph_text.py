"""Small graphs written as text, and what they compute on ONNX Runtime: for the tests of passes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
import onnxruntime
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

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


class Equal(OpRun):
    """Equal that takes texts of different lengths, which onnx 1.23's own refuses as different types."""

    op_domain = ""

    def _run(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray]:
        return (np.equal(a, b),)


def on_onnx(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The outputs on ONNX's own evaluator, function bodies inlined, each value in its own type."""
    with np.errstate(all="ignore"):
        return ReferenceEvaluator(onnx.inliner.inline_local_functions(model), new_ops=[Equal]).run(None, dict(feeds))
