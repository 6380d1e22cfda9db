from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from qsparse_export import ops
from qsparse_export.errors import UsageError
from qsparse_export.formats import nbits
from qsparse_export.ops.dense_matmul_nbits import dense_matmul_nbits
from qsparse_export.ops.gather_nbits import gather_nbits, reference


def matrix(n: int, k: int, bits: int, group: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Packed codes, scales, and the codes themselves, int8 [N, k]."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-(1 << bits - 1), 1 << bits - 1, (n, k)).astype(np.int8)
    scales = rng.uniform(0.01, 0.2, (n, nbits.group_count(k, group))).astype(np.float16)
    return nbits.pack_outputs(codes, bits), scales, codes


def run_body(
    ids: np.ndarray, w: np.ndarray, scales: np.ndarray, level: str = "ENABLE_ALL", **attributes: int
) -> np.ndarray:
    """The function body on stock ONNX Runtime, ``ids`` an input with free dimensions."""
    ops.register()
    node = helper.make_node("GatherNBits", ["ids", "w", "scales"], ["y"], domain=ops.DOMAIN, **attributes)
    lead = [f"d{i}" for i in range(ids.ndim)]
    graph = helper.make_graph(
        [node],
        "one_op",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, lead)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [*lead, attributes["k"]])],
        [numpy_helper.from_array(w, "w"), numpy_helper.from_array(scales, "scales")],
    )
    opsets = [helper.make_opsetid("", ops.BODY_OPSET), helper.make_opsetid(ops.DOMAIN, ops.VERSION)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    model = ir.to_proto(ops.attach_functions(ir.from_proto(model)))
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_{level}")
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"ids": ids})[0]


def test_reference_takes_rows_and_multiplies_by_their_scales():
    w, scales, codes = matrix(5, 15, 4, 8)
    got = reference(np.array([[4], [0]]), w, scales, 15, 4, 8)
    assert got.shape == (2, 1, 15) and got.dtype == np.float32
    for row, taken in ((4, got[0, 0]), (0, got[1, 0])):
        for channel in range(15):
            assert taken[channel] == np.float32(codes[row, channel]) * np.float32(scales[row, channel // 8])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("level", ["DISABLE_ALL", "ENABLE_ALL"])
@pytest.mark.parametrize(
    ("shape", "k", "group"), [((), 32, 32), ((3,), 75, 32), ((2, 3), 75, 24), ((0,), 8, 8), ((2, 0), 9, 16)]
)
def test_body_is_the_reference(bits, level, shape, k, group):
    w, scales, _ = matrix(11, k, bits, group)
    ids = np.random.default_rng(1).integers(0, 11, shape, np.int64)
    attributes = {"k": k, "bits": bits, "group": group}
    got = run_body(np.asarray(ids), w, scales, level, **attributes)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, reference(np.asarray(ids), w, scales, **attributes))


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 80), st.sampled_from([4, 8]), st.sampled_from([8, 24, 90]), st.integers(0, 99)
)
def test_property_body_and_torch_op_are_the_reference(n, k, bits, group, seed):
    w, scales, _ = matrix(n, k, bits, group, seed)
    ids = np.random.default_rng(seed).integers(0, n, (2, 3))
    expected = reference(ids, w, scales, k, bits, group)
    np.testing.assert_array_equal(run_body(ids, w, scales, k=k, bits=bits, group=group), expected)
    got = gather_nbits(torch.from_numpy(ids), torch.from_numpy(w), torch.from_numpy(scales), k, bits, group)
    np.testing.assert_array_equal(got.numpy(), expected)


def test_rows_are_those_of_the_head_that_is_tied_to_it():
    w, scales, _ = matrix(6, 40, 4, 32)
    packed, scale = torch.from_numpy(w), torch.from_numpy(scales)
    rows = gather_nbits(torch.arange(6), packed, scale, 40, 4, 32)
    np.testing.assert_array_equal(dense_matmul_nbits(torch.eye(40), packed, scale, 6, 4, 32).t(), rows)


@pytest.mark.parametrize("bits", [4, 8])
def test_torch_op_passes_opcheck(bits):
    w, scales, _ = matrix(9, 41, bits, 32)
    ids = torch.tensor([[0, 8], [3, 3]])
    torch.library.opcheck(gather_nbits, (ids, torch.from_numpy(w), torch.from_numpy(scales), 41, bits, 32))


def test_what_does_not_fit_is_refused():
    w, scales, _ = matrix(9, 40, 4, 32)
    packed, scale = torch.from_numpy(w), torch.from_numpy(scales)
    for outside in (-1, 9):
        with pytest.raises(UsageError, match="expected 0 to 8"):
            reference(np.array([0, outside]), w, scales, 40, 4, 32)
        with pytest.raises(UsageError, match="expected 0 to 8"):
            gather_nbits(torch.tensor([0, outside]), packed, scale, 40, 4, 32)
    with pytest.raises(UsageError, match=r"expected \[9, 21\]"):
        gather_nbits(torch.tensor([0]), packed, scale, 41, 4, 32)
    with pytest.raises(UsageError, match="expected int64"):
        gather_nbits(torch.tensor([0.0]), packed, scale, 40, 4, 32)
