"""fuse-sparse-matmul and fuse-sparse-nbits: what they match and what not, that twice is once, and the numbers."""

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from qsparse_export import ops
from qsparse_export.formats import nbits
from qsparse_export.passes.base import Pass
from qsparse_export.passes.fuse_sparse_matmul import FLOAT, FuseSparseMatMul
from qsparse_export.passes.fuse_sparse_nbits import NBITS, FuseSparseNBits
from qsparse_export.passes.join_matrices import explain
from qsparse_export.passes.lower_attach_bodies import AttachBodies
from qsparse_export.runtimes.ort.library import library_path

K, GROUP = 96, 32
MASK = 'h = ai.qsparse.TopKSparsify <k = 40, block = 0, rescale = "none"> (x)'


def graph_of(text: str, outputs: dict[str, int], weights: dict[str, np.ndarray], dtype: str = "float") -> ir.Model:
    declared = ", ".join(f"{dtype}[M, {n}] {name}" for name, n in outputs.items())
    header = '<ir_version: 11, opset_import: ["" : 23, "ai.qsparse" : 1]>'
    made = onnx.parser.parse_model(f"{header} g ({dtype}[M, {K}] x) => ({declared}) {{ {text} }}")
    made.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in weights.items())
    ops.register()
    return ir.from_proto(onnx.shape_inference.infer_shapes(made, strict_mode=True))


def float_weights(dtype: type = np.float32, **outputs: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=(K, n)).astype(dtype) for name, n in outputs.items()}


def code_weights(bits: int, **outputs: int) -> dict[str, np.ndarray]:
    rng, made = np.random.default_rng(0), {}
    for name, n in outputs.items():
        packed = nbits.pack_channels(rng.integers(-(1 << bits - 1), 1 << bits - 1, (n, K)).astype(np.int8), bits)
        if bits == 4:
            nibbles = np.stack((packed & 15, packed >> 4), axis=-1).reshape(K, -1)
            made[name] = ((nibbles ^ 8).astype(np.int8) - 8).astype(ml_dtypes.int4)
        else:
            made[name] = packed.view(np.int8)
        made[f"{name}_s"] = rng.uniform(0.01, 0.1, (K // GROUP, nbits.columns(n))).astype(np.float16)
    return made


def nbits_product(y: str, x: str, name: str, n: int, bits: int, k: int = K) -> str:
    attributes = f'k = {k}, block = 0, rescale = "none", n = [{n}], bits = {bits}, group = {GROUP}'
    return f"{y} = ai.qsparse.SparseMatMulNBits <{attributes}> ({x}, {name}, {name}_s)"


def float_pair(dtype: str = "float") -> ir.Model:
    numpy_type = np.float32 if dtype == "float" else np.float16
    text = f"{MASK} q = MatMul (h, wq) v = MatMul (h, wv)"
    return graph_of(text, {"q": 130, "v": 7}, float_weights(numpy_type, wq=130, wv=7), dtype)


def nbits_pair(bits: int = 4, dtype: str = "float") -> ir.Model:
    text = f"{MASK} {nbits_product('q', 'h', 'wq', 130, bits)} {nbits_product('v', 'h', 'wv', 7, bits)}"
    return graph_of(text, {"q": 130, "v": 7}, code_weights(bits, wq=130, wv=7), dtype)


def run(graph: ir.Model, x: np.ndarray, native: bool) -> list[np.ndarray]:
    AttachBodies()(graph)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if native:
        options.register_custom_ops_library(str(library_path()))
    made = ir.to_proto(graph)
    onnx.checker.check_model(made, full_check=True)
    return onnxruntime.InferenceSession(made.SerializeToString(), options).run(None, {"x": x})


CASES = [
    (lambda: float_pair(), FuseSparseMatMul()),
    (lambda: nbits_pair(4), FuseSparseNBits()),
    (lambda: nbits_pair(8), FuseSparseNBits()),
]


@pytest.mark.parametrize(("make", "step"), CASES)
def test_structure(make, step: Pass):
    graph = make()
    assert step(graph).modified
    joined = "SparseMatMul" if isinstance(step, FuseSparseMatMul) else "SparseMatMulNBits"
    assert [node.op_type for node in graph.graph] == [joined, "Split"]
    fused = graph.graph[0]
    assert fused.attributes["k"].as_int() == 40 and list(fused.attributes["n"].as_ints()) == [130, 7]
    assert set(graph.graph.initializers) == {value.name for value in fused.inputs[1:]} | {graph.graph[1].inputs[1].name}
    assert not step(graph).modified, "a second time changes nothing"


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize("bits", [None, 4, 8])
def test_numbers_stay(native, dtype, bits):
    def make() -> ir.Model:
        return float_pair(dtype) if bits is None else nbits_pair(bits, dtype)

    x = np.random.default_rng(1).normal(size=(3, K)).astype(np.float32 if dtype == "float" else np.float16)
    expected = run(make(), x, native)
    fused = make()
    assert (FuseSparseMatMul() if bits is None else FuseSparseNBits())(fused).modified
    # 16-bit activations at one row, float at several; float16 results round once more
    tolerance = 2e-3 if dtype == "float16" else 1e-5
    for got, wanted in zip(run(fused, x, native), expected, strict=True):
        assert got.dtype == wanted.dtype and got.shape == wanted.shape
        np.testing.assert_allclose(got, wanted, atol=tolerance * np.abs(wanted).max(), rtol=0)


def test_unmasked_codes_are_joined_and_unmasked_floats_are_not():
    text = f"{nbits_product('q', 'x', 'wq', 64, 8)} {nbits_product('v', 'x', 'wv', 64, 8)}"
    codes = graph_of(text, {"q": 64, "v": 64}, code_weights(8, wq=64, wv=64))
    assert FuseSparseNBits()(codes).modified
    floats = graph_of("q = MatMul (x, wq) v = MatMul (x, wv)", {"q": 64, "v": 64}, float_weights(wq=64, wv=64))
    assert not FuseSparseMatMul()(floats).modified
    assert explain(floats.graph, floats.graph.inputs[0], FLOAT) == "no mask: nothing to share"


def test_what_is_not_joined():
    read_twice = graph_of(f"{MASK} q = MatMul (h, wq) r = Relu (h)", {"q": 5, "r": K}, float_weights(wq=5))
    assert not FuseSparseMatMul()(read_twice).modified
    assert explain(read_twice.graph, read_twice.graph[0].outputs[0], FLOAT) == "something else reads the masked value"
    text = f"{MASK} {nbits_product('q', 'h', 'wq', 64, 8, k=30)}"
    masked_twice = graph_of(text, {"q": 64}, code_weights(8, wq=64))
    assert not FuseSparseNBits()(masked_twice).modified
    assert "mask of its own" in explain(masked_twice.graph, masked_twice.graph[0].outputs[0], NBITS)
    mixed = graph_of(
        f"{MASK} {nbits_product('q', 'h', 'wq', 64, 8)} {nbits_product('v', 'h', 'wv', 64, 4)}",
        {"q": 64, "v": 64},
        code_weights(8, wq=64) | code_weights(4, wv=64),
    )
    assert not FuseSparseNBits()(mixed).modified
    assert explain(mixed.graph, mixed.graph[0].outputs[0], NBITS) == "the matrices are stored in different ways"
    not_constant = graph_of(f"{MASK} t = Transpose <perm = [1, 0]> (x) q = MatMul (h, t)", {"q": 5}, {})
    assert not FuseSparseMatMul()(not_constant).modified
