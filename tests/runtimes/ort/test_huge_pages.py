"""Weights move from the mapped file into huge pages, where the system has them, and leave with their session."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from qsparse_export.formats import nbits
from qsparse_export.runtimes.ort.library import library_path, open_library

K, N, GROUP = 1024, 8192, 32
WEIGHT_BYTES = K * N // 2 + N * K // GROUP * 2
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HAS_HUGE_PAGES = SETTING.is_file() and "[never]" not in SETTING.read_text()


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """A model of one DenseMatMulNBits: its weights and their scales are in a file of their own."""
    rng = np.random.default_rng(3)
    w = rng.integers(0, 256, (N, nbits.output_row_bytes(K, 4)), np.uint8)
    scales = rng.uniform(0.01, 0.02, (N, nbits.group_count(K, GROUP))).astype(np.float16)
    node = helper.make_node(
        "DenseMatMulNBits", ["x", "w", "scales"], ["y"], domain="ai.qsparse", n=N, k=K, bits=4, group=GROUP
    )
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
    tensors = [numpy_helper.from_array(w, "w"), numpy_helper.from_array(scales, "scales")]
    graph = helper.make_graph([node], "head", values[:1], values[1:], tensors)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("ai.qsparse", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    path = tmp_path_factory.mktemp("head") / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    return path


def run(model: Path | bytes) -> tuple[np.ndarray, int, int]:
    """y, the bytes that came into huge pages with the session, and those that are left without it."""
    library = open_library()
    before = library.huge_page_bytes()
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library_path()))
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    held = library.huge_page_bytes() - before
    (y,) = session.run(None, {"x": np.linspace(-1, 1, K, dtype=np.float32)[None]})
    del session
    return y, held, library.huge_page_bytes() - before


def test_weights_of_a_mapped_file_move_and_leave_with_their_session(head, monkeypatch):
    monkeypatch.setenv("QSPARSE_HUGE_PAGES", "0")
    y_mapped, held_mapped, _ = run(head)
    monkeypatch.delenv("QSPARSE_HUGE_PAGES")
    y, held, left = run(head)
    assert (held_mapped, held, left) == (0, WEIGHT_BYTES * HAS_HUGE_PAGES, 0)
    np.testing.assert_array_equal(y, y_mapped)


def test_the_file_s_own_memory_is_given_back(head):
    """Little of what is mapped of it is in memory."""
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library_path()))
    session = onnxruntime.InferenceSession(head, options, providers=["CPUExecutionProvider"])
    resident = resident_bytes(head.with_name("model.onnx.data"))
    assert session.get_inputs()
    assert resident < WEIGHT_BYTES // 4 if HAS_HUGE_PAGES else resident > 0


def resident_bytes(file: Path) -> int:
    """How much of ``file`` this process has mapped and in memory."""
    total, is_of_file = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(maxsplit=1)[0]:
            is_of_file = line.endswith(str(file))
        elif is_of_file and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_weights_inside_the_model_stay(head):
    """There would be two of them."""
    y, held, _ = run(onnx.load(head).SerializeToString())
    assert held == 0
    np.testing.assert_array_equal(y, run(head)[0])
