"""Running one operator's function body on stock ONNX Runtime, with no kernel library."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from qsparse_export import ops

LEVELS = {
    "off": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers in every run, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def op_model() -> Callable[..., onnx.ModelProto]:
    """A checked model of one op, its body attached; ``x`` is an input with free leading dims, the rest constants."""
    ops.register()

    def build(
        name: str, x: np.ndarray, constants: dict[str, np.ndarray], **attributes: int | str | list[int]
    ) -> onnx.ModelProto:
        kind = TensorProto.FLOAT if x.dtype == np.float32 else TensorProto.FLOAT16
        lead = [f"d{i}" for i in range(x.ndim - 1)]
        node = helper.make_node(name, ["x", *constants], ["y"], domain=ops.DOMAIN)
        node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        graph = helper.make_graph(
            [node],
            "one_op",
            [helper.make_tensor_value_info("x", kind, [*lead, x.shape[-1]])],
            [helper.make_tensor_value_info("y", kind, [*lead, None])],
            [numpy_helper.from_array(value, key) for key, value in constants.items()],
        )
        opsets = [helper.make_opsetid("", ops.BODY_OPSET), helper.make_opsetid(ops.DOMAIN, ops.VERSION)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
        model = ir.to_proto(ops.attach_functions(ir.from_proto(model)))
        onnx.checker.check_model(model, full_check=True)
        return model

    return build


@pytest.fixture(scope="session")
def run_body() -> Callable[..., np.ndarray]:
    """Runs a model on ORT's CPU provider at one of LEVELS."""

    def run(model: onnx.ModelProto, x: np.ndarray, level: str = "all") -> np.ndarray:
        options = ort.SessionOptions()
        options.graph_optimization_level = LEVELS[level]
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # float32 activations
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return session.run(None, {"x": x})[0]

    return run
