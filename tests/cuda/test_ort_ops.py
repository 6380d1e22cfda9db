"""libqsparse_ort_cuda inside ONNX Runtime: its ops with the emulated kernels, on the CPU execution provider."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from emulated_kernels import build_emulated_ort
from evidence import EMULATED, Evidence, Record
from onnx import TensorProto, helper
from sparse_matmul_cases import SparseMatMul, integer_weights
from sparse_ternary_cases import SparseTernary
from ternary_cases import ternary_weights
from topk_cases import TopK

KINDS = {np.float32: TensorProto.FLOAT, np.float16: TensorProto.FLOAT16}


@pytest.fixture(scope="module")
def library() -> Path:
    return build_emulated_ort(with_cpu_ops=False)


def run(library: Path, op: str, x: np.ndarray, constants: list[TensorProto], **attributes: Any) -> np.ndarray:
    """y of one node that has no function body: it runs native or not at all."""
    node = helper.make_node(op, ["x", *(tensor.name for tensor in constants)], ["y"], domain="ai.qsparse", **attributes)
    kind = KINDS[x.dtype.type]
    inputs, outputs = (helper.make_tensor_value_info(name, kind, None) for name in "xy")
    graph = helper.make_graph([node], "one_node", [inputs], [outputs], constants)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("ai.qsparse", 1)]
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def constant(name: str, array: np.ndarray, kind: int | None = None) -> TensorProto:
    """A tensor of the array's own type, or of packed int4 values."""
    kind = helper.np_dtype_to_tensor_dtype(array.dtype) if kind is None else kind
    columns = array.shape[1] * 2 if kind == TensorProto.INT4 else array.shape[-1]
    return helper.make_tensor(name, kind, [*array.shape[:-1], columns], array.tobytes(), raw=True)


def calls(library: Path) -> dict[str, dict[str, int]]:
    text = ctypes.create_string_buffer(4096)
    ctypes.CDLL(str(library)).qsparse_ort_calls(text, ctypes.c_int64(len(text)))
    return json.loads(text.value)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("m", (0, 1, 3, 33))
def test_ops(library: Path, dtype: type, m: int, evidence: Record) -> None:
    rng = np.random.default_rng(m)
    x = rng.standard_normal((m, 70)).astype(dtype)
    before = calls(library)

    y = run(library, "TopKSparsify", x, [], k=20, block=0, rescale="l2")
    TopK(x, 20, 0, True).check(y)

    matrices = tuple(ternary_weights(rng, n, 70, "normal") for n in (130, 0, 5))
    sparse = SparseTernary(x, matrices, 20)
    constants = [constant("w", sparse.packed()), constant("scales", sparse.scales)]
    y = run(library, "SparseTernaryMatMul", x, constants, k=20, block=0, rescale="none", n=[130, 0, 5])
    sparse.check(y)

    dense = SparseTernary(x, matrices[:1], 70)
    constants = [constant("w", dense.packed()), constant("scale", dense.scales)]
    share = dense.check(run(library, "TernaryMatMul", x, constants, n=130))

    for bits, kind in ((4, TensorProto.INT4), (8, TensorProto.INT8)):
        weights = integer_weights(rng, (65, 1), 70, bits, 32)
        case = SparseMatMul(x, weights, 16, 32, fixed_point=False)
        constants = [constant("w", weights.rows, kind), constant("scales", weights.scales)]
        attributes = {"k": 16, "block": 32, "rescale": "none", "n": [65, 1], "bits": bits, "group": 32}
        case.check(run(library, "SparseMatMulNBits", x, constants, **attributes))

    ran = {op: counts["cuda"] - before.get(op, {}).get("cuda", 0) for op, counts in calls(library).items()}
    assert ran == {"TopKSparsify": 1, "SparseTernaryMatMul": 1, "TernaryMatMul": 1, "SparseMatMulNBits": 2}
    evidence(Evidence("TernaryMatMul", "CUDA", "any", EMULATED, "blocks and threads on the CPU", share))


def test_ops_of_both_providers_are_one_domain() -> None:
    """A session without the CUDA provider takes the CPU's ops from the same library."""
    library = build_emulated_ort(with_cpu_ops=True)
    x = np.random.default_rng(2).standard_normal((2, 40)).astype(np.float32)
    TopK(x, 7).check(run(library, "TopKSparsify", x, [], k=7, block=0, rescale="none"))
    weights = ternary_weights(np.random.default_rng(2), 5, 40, "normal")
    case = SparseTernary(x, (weights,), 40)
    case.check(run(library, "TernaryMatMul", x, [constant("w", case.packed()), constant("scale", case.scales)], n=5))
    counts = calls(library)
    assert counts.keys() == {"TopKSparsify", "TernaryMatMul"}
    assert not any("cuda" in variants for variants in counts.values())


def test_leading_dimensions(library: Path) -> None:
    x = np.random.default_rng(1).standard_normal((2, 1, 3, 40)).astype(np.float32)
    y = run(library, "TopKSparsify", x, [], k=7, block=0, rescale="none")
    assert y.shape == x.shape
    TopK(x.reshape(6, 40), 7).check(y.reshape(6, 40))


@pytest.mark.parametrize(
    ("op", "attributes", "message"),
    (
        ("TopKSparsify", {"k": 41, "block": 0, "rescale": "none"}, "k is 41 but x is [1, 40]; expected 0..40"),
        ("TopKSparsify", {"k": 4, "block": 0, "rescale": "l1"}, 'rescale is "l1"; expected'),
        ("TernaryMatMul", {"n": 129}, "w is [40, 32]; expected w as [40, 64]"),
        ("TernaryMatMul", {"n": -1}, "n is -1; expected 0 or more"),
    ),
)
def test_mistakes_are_refused(library: Path, op: str, attributes: dict[str, Any], message: str) -> None:
    x = np.zeros((1, 40), np.float32)
    weights = [constant("w", np.zeros((40, 32), np.uint8)), constant("scale", np.ones(1, np.float32))]
    with pytest.raises(Exception) as error:
        run(library, op, x, weights if op == "TernaryMatMul" else [], **attributes)
    assert message in str(error.value)
