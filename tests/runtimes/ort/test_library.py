"""The custom-op library inside ONNX Runtime: the same results as the ops' references, and proof that it ran."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from qsparse_export import ops
from qsparse_export.errors import TargetError
from qsparse_export.formats import ternary
from qsparse_export.ops.sparse_ternary_matmul import reference as sparse_reference
from qsparse_export.ops.ternary_matmul import reference as ternary_reference
from qsparse_export.ops.topk_sparsify import reference as topk_reference
from qsparse_export.runtimes.ort.library import Library, library_path, open_library

FLOATS = ("float32", "float16")
KINDS = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "float64": TensorProto.DOUBLE}
SCALE = np.array([0.02], np.float32)


@pytest.fixture
def library() -> Library:
    opened = open_library()
    opened.reset_calls()
    return opened


def node_model(op: str, kind: int, constants: dict[str, np.ndarray], **attributes: Any) -> bytes:
    """One node without a function body: it runs native or not at all. Constants named ``*_in`` are inputs."""
    inputs = ["x", *constants]
    node = helper.make_node(op, inputs, ["y"], domain="ai.qsparse", **attributes)
    fixed = {name: array for name, array in constants.items() if not name.endswith("_in")}
    given = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), list(array.shape))
        for name, array in constants.items()
        if name not in fixed
    ]
    graph = helper.make_graph(
        [node],
        "one_node",
        [helper.make_tensor_value_info("x", kind, None), *given],
        [helper.make_tensor_value_info("y", kind, None)],
        [numpy_helper.from_array(array, name) for name, array in fixed.items()],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("ai.qsparse", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def session(model: bytes, threads: int = 1) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library_path()))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def topk_model(dtype: str = "float32", k: int = 7, block: int = 0, rescale: str = "none") -> bytes:
    return node_model("TopKSparsify", KINDS[dtype], {}, k=k, block=block, rescale=rescale)


def ternary_model(weights: np.ndarray, dtype: str = "float32", n: int | None = None) -> bytes:
    constants = {"w": ternary.pack(weights), "scale": SCALE}
    return node_model("TernaryMatMul", KINDS[dtype], constants, n=len(weights) if n is None else n)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", ((40,), (1, 1, 40), (2, 3, 40), (0, 40), (1, 0, 40), (2, 1, 2, 3, 40)))
def test_leading_dimensions(library: Library, dtype: str, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(len(shape))
    x: np.ndarray = rng.standard_normal(shape).astype(dtype)
    weights = rng.integers(-1, 2, (300, 40)).astype(np.int8)
    kept = session(topk_model(dtype)).run(None, {"x": x})[0]
    np.testing.assert_array_equal(kept, topk_reference(x, 7), strict=True)
    y = session(ternary_model(weights, dtype)).run(None, {"x": kept})[0]
    np.testing.assert_array_equal(y, ternary_reference(kept, ternary.pack(weights), SCALE, 300), strict=True)
    chosen = library.chosen()
    assert library.calls() == {"TopKSparsify": {chosen: 1}, "TernaryMatMul": {chosen: 1}}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("k", "block", "rescale"), ((0, 0, "none"), (100, 0, "none"), (5, 16, "none"), (30, 0, "l2")))
def test_topk_attributes(dtype: str, k: int, block: int, rescale: str) -> None:
    x: np.ndarray = np.random.default_rng(1).standard_normal((3, 100)).astype(dtype)
    x[1, 5] = np.nan
    y = session(topk_model(dtype, k, block, rescale)).run(None, {"x": x})[0]
    expected = topk_reference(x, k, block, rescale)
    if rescale == "none":
        np.testing.assert_array_equal(y, expected)
    else:
        np.testing.assert_allclose(y, expected, rtol=1e-3 if dtype == "float16" else 1e-6)


def sparse_operands(n: list[int], k: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(4)
    packed = [ternary.pack(rng.integers(-1, 2, (outputs, k)).astype(np.int8)) for outputs in n]
    return {"w": np.concatenate(packed, axis=1), "scales": np.linspace(0.01, 0.2, len(n)).astype(np.float32)}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", ((96,), (1, 1, 96), (2, 3, 96), (0, 96), (3, 11, 96)))
def test_fused_matrices(library: Library, dtype: str, shape: tuple[int, ...]) -> None:
    n = [130, 5, 0, 256, 300]
    operands = sparse_operands(n, 96)
    x: np.ndarray = np.random.default_rng(5).standard_normal(shape).astype(dtype)
    model = node_model("SparseTernaryMatMul", KINDS[dtype], operands, k=40, block=0, rescale="none", n=n)
    y = session(model, 2).run(None, {"x": x})[0]
    np.testing.assert_array_equal(y, sparse_reference(x, *operands.values(), 40, 0, "none", n), strict=True)
    assert library.calls() == {"SparseTernaryMatMul": {library.chosen(): 1}}


def test_fused_mistakes_are_refused() -> None:
    operands = sparse_operands([5, 130], 96)
    x = np.zeros((2, 96), np.float32)

    def run(n: list[int], operands: dict[str, np.ndarray] = operands, **attributes: Any) -> None:
        given = {"k": 3, "block": 0, "rescale": "none"} | attributes
        session(node_model("SparseTernaryMatMul", KINDS["float32"], operands, n=n, **given)).run(None, {"x": x})

    run([5, 130])
    with pytest.raises(Exception, match=r"x is \[2, 96\] and w is \[96, 96\]; expected w as \[96, 128\]"):
        run([5, 257])
    with pytest.raises(Exception, match=r"scales is \[2\]; expected \[1\], one for each entry of n"):
        run([300])
    with pytest.raises(Exception, match="n has the entry -1"):
        run([5, -1])
    with pytest.raises(Exception, match="n has 65 entries; at most 64 are supported"):
        run([1] * 65)
    with pytest.raises(Exception, match=r"k is 97 but x is \[2, 96\]"):
        run([5, 130], k=97)
    with pytest.raises(Exception, match='rescale is "l1"'):
        run([5, 130], rescale="l1")


@pytest.mark.parametrize("threads", (1, 2, 4))
@pytest.mark.parametrize("m", (1, 2, 3, 7, 8, 16, 33))
def test_threads_of_the_session(threads: int, m: int) -> None:
    rng = np.random.default_rng(2)
    weights = rng.integers(-1, 2, (2730, 1536)).astype(np.int8)
    x = rng.standard_normal((m, 1536)).astype(np.float32)
    x[:, rng.random(1536) < 0.5] = 0
    x[0, 3] = np.inf
    y = session(ternary_model(weights), threads).run(None, {"x": x})[0]
    np.testing.assert_array_equal(y, ternary_reference(x, ternary.pack(weights), SCALE, 2730))


def test_every_variant_runs_and_is_counted(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(3).standard_normal((2, 40)).astype(np.float32)
    for variant in library.supported:
        monkeypatch.setenv("QSPARSE_VARIANT", variant)
        library.reset_calls()
        one = session(topk_model())
        monkeypatch.delenv("QSPARSE_VARIANT")
        for _ in range(3):
            one.run(None, {"x": x})
        assert library.calls() == {"TopKSparsify": {variant: 3}}, "the variant is chosen when the kernel is created"
    library.reset_calls()
    assert library.calls() == {}


@pytest.mark.parametrize("variant", ("avx3", "neon"))
def test_impossible_variant_fails_the_session(library: Library, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if variant in library.supported:
        variant = "avx2"
    monkeypatch.setenv("QSPARSE_VARIANT", variant)
    with pytest.raises(Exception, match=f"QSPARSE_VARIANT={variant} .*supported here: generic"):
        session(topk_model())


def test_weights_as_an_input() -> None:
    rng = np.random.default_rng(4)
    weights = rng.integers(-1, 2, (9, 40)).astype(np.int8)
    packed = ternary.pack(weights)
    model = node_model("TernaryMatMul", TensorProto.FLOAT, {"w_in": packed, "scale_in": SCALE}, n=9)
    x = rng.standard_normal((2, 40)).astype(np.float32)
    run = session(model).run
    y = run(None, {"x": x, "w_in": packed, "scale_in": SCALE})[0]
    np.testing.assert_array_equal(y, ternary_reference(x, packed, SCALE, 9))


def test_shapes_are_inferred_with_symbols() -> None:
    weights = np.zeros((9, 40), np.int8)
    model = onnx.load_from_string(ternary_model(weights, "float16"))
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["batch", "tokens", 40]))
    node = session(model.SerializeToString()).get_outputs()[0]
    assert (node.shape, node.type) == (["batch", "tokens", 9], "tensor(float16)")


def failing(run: Callable[[], object]) -> str:
    with pytest.raises(Exception) as caught:
        run()
    return str(caught.value)


def test_bad_attributes_fail_the_session() -> None:
    assert "k is -1; expected 0" in failing(lambda: session(topk_model(k=-1)))
    assert "k is 5; expected 0..4 (the block)" in failing(lambda: session(topk_model(k=5, block=4)))
    assert "block is -2; expected 0 or more" in failing(lambda: session(topk_model(k=0, block=-2)))
    assert 'rescale is "l1"; expected "none" or "l2"' in failing(lambda: session(topk_model(rescale="l1")))
    missing = node_model("TopKSparsify", TensorProto.FLOAT, {}, k=1, block=0)
    assert "ai.qsparse:TopKSparsify needs the attribute rescale (string)" in failing(lambda: session(missing))
    weights = np.zeros((9, 40), np.int8)
    assert "w is [40, 32]; 129 outputs take [K, 64]" in failing(lambda: session(ternary_model(weights, n=129)))
    assert "n is -1; expected 0 or more" in failing(lambda: session(ternary_model(weights, n=-1)))


def test_bad_inputs_fail_the_run() -> None:
    weights = np.zeros((9, 40), np.int8)
    topk, matmul = session(topk_model(k=41)), session(ternary_model(weights))
    x = np.zeros((2, 40), np.float32)
    assert "k is 41 but x is [2, 40]; expected 0..40" in failing(lambda: topk.run(None, {"x": x}))
    assert "x is a scalar" in failing(lambda: topk.run(None, {"x": np.array(1, np.float32)}))
    narrow = x[:, :39].copy()
    message = failing(lambda: matmul.run(None, {"x": narrow}))
    assert "x is [2, 39] but w is [40, 32]; expected x as [..., 40]" in message
    model = node_model("TernaryMatMul", TensorProto.FLOAT, {"w": ternary.pack(weights), "s_in": SCALE}, n=9)
    loose = onnx.load_from_string(model)
    loose.graph.input[1].type.tensor_type.ClearField("shape")
    two = np.ones(2, np.float32)
    message = failing(lambda: session(loose.SerializeToString()).run(None, {"x": x, "s_in": two}))
    assert "scale is [2]; expected one element" in message


def test_other_types_are_refused() -> None:
    assert "tensor(double)" in failing(lambda: session(topk_model("float64")))


def test_a_runtime_that_is_too_old_gets_an_error() -> None:
    """Not a silent success: ONNX Runtime would then run the slow function bodies without a word."""
    runtime = ctypes.CDLL(str(next(Path(ort.__file__).parent.glob("capi/libonnxruntime.so*"))))

    class Base(ctypes.Structure):
        _fields_ = (
            ("get_api", ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)),
            ("get_version", ctypes.CFUNCTYPE(ctypes.c_char_p)),
        )

    runtime.OrtGetApiBase.restype = ctypes.POINTER(Base)
    real = runtime.OrtGetApiBase().contents
    get_api = type(real.get_api)(lambda version: real.get_api(version) if version < 18 else None)
    register = open_library().handle.RegisterCustomOps
    register.restype = ctypes.c_void_p
    status = register(None, ctypes.byref(Base(get_api, real.get_version)))
    assert status is not None
    functions = ctypes.cast(real.get_api(1), ctypes.POINTER(ctypes.c_void_p))
    get_message = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p)(functions[2])
    assert get_message(status).startswith(b"the ai.qsparse custom ops need ONNX Runtime 1.18 or newer; this is 1.")


def test_no_memory_is_lost_or_grows(library: Library) -> None:
    """Scratch is kept per thread: many calls leave the process as large as a few."""
    weights = np.random.default_rng(5).integers(-1, 2, (2048, 2048)).astype(np.int8)
    one = session(ternary_model(weights), 2)
    x = np.random.default_rng(6).standard_normal((16, 2048)).astype(np.float16).astype(np.float32)

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    for _ in range(20):
        one.run(None, {"x": x})
    before = resident_bytes()
    for _ in range(200):
        one.run(None, {"x": x})
    assert resident_bytes() - before < 4 << 20


def test_library_facts(library: Library, tmp_path: Path) -> None:
    assert library.ops == tuple(ops.OPS)
    assert library.version.count(".") == 2
    assert library.chosen() == library.supported[-1]
    with pytest.raises(TargetError, match="cannot be used as the kernel library"):
        open_library(tmp_path / "missing.so")
    stranger = next(Path(ort.__file__).parent.glob("capi/libonnxruntime.so*"))
    with pytest.raises(TargetError, match=r"cannot be used as the kernel library: .*qsk_"):
        open_library(stranger)
