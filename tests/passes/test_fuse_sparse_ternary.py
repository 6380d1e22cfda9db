"""fuse-sparse-ternary: what it matches and what not, that twice is once, and that the numbers stay the same bits."""

import re

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from qsparse_export import ops
from qsparse_export.formats.ternary import pack
from qsparse_export.passes.fuse_sparse_ternary import TERNARY, FuseSparseTernary
from qsparse_export.passes.join_matrices import explain
from qsparse_export.passes.lower_attach_bodies import AttachBodies
from qsparse_export.runtimes.ort.library import library_path

K = 96


def model(text: str, outputs: dict[str, int], initializers: dict[str, np.ndarray], dtype: str = "float") -> ir.Model:
    """The nodes of ``text`` on x [M, K]; ``outputs`` are their widths."""
    declared = ", ".join(f"{dtype}[M, {n}] {name}" for name, n in outputs.items())
    header = '<ir_version: 11, opset_import: ["" : 23, "ai.qsparse" : 1]>'
    made = onnx.parser.parse_model(f"{header} g ({dtype}[M, {K}] x) => ({declared}) {{ {text} }}")
    for node in made.graph.node:  # the text form has no dots in names
        node.input[:] = [re.sub(r"^a_(\w+)_(packed|scale)$", r"a.\1.\2", name) for name in node.input]
    made.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in initializers.items())
    ops.register()
    return ir.from_proto(onnx.shape_inference.infer_shapes(made, strict_mode=True))


def weights(**outputs: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made: dict[str, np.ndarray] = {}
    for i, (name, n) in enumerate(outputs.items()):
        made[f"a.{name}.packed"] = pack(rng.integers(-1, 2, (n, K)).astype(np.int8))
        made[f"a.{name}.scale"] = np.array([0.01 * (i + 1)], np.float32)
    return made


def product(y: str, x: str, name: str, n: int) -> str:
    return f"{y} = ai.qsparse.TernaryMatMul <n = {n}> ({x}, a_{name}_packed, a_{name}_scale)"


def mask(y: str = "h", x: str = "x", k: int = 40, block: int = 0, rescale: str = "none") -> str:
    return f'{y} = ai.qsparse.TopKSparsify <k = {k}, block = {block}, rescale = "{rescale}"> ({x})'


def masked_pair(dtype: str = "float", k: int = 40, block: int = 0, rescale: str = "none") -> ir.Model:
    text = f"{mask(k=k, block=block, rescale=rescale)} {product('q', 'h', 'q', 130)} {product('v', 'h', 'v', 7)}"
    return model(text, {"q": 130, "v": 7}, weights(q=130, v=7), dtype)


def kinds(graph: ir.Model) -> list[str]:
    return [node.op_type for node in graph.graph]


def run(graph: ir.Model, x: np.ndarray, native: bool) -> list[np.ndarray]:
    AttachBodies()(graph)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if native:
        options.register_custom_ops_library(str(library_path()))
    made = ir.to_proto(graph)
    onnx.checker.check_model(made, full_check=True)
    return onnxruntime.InferenceSession(made.SerializeToString(), options).run(None, {"x": x})


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", ["float", "float16"])
@pytest.mark.parametrize("selection", [{}, {"block": 32, "k": 16}, {"k": 0}])
def test_same_bits_before_and_after(native, dtype, selection):
    x = np.random.default_rng(1).normal(size=(3, K)).astype(np.float32 if dtype == "float" else np.float16)
    x[1, 4] = np.nan
    expected = run(masked_pair(dtype, **selection), x, native)
    fused = masked_pair(dtype, **selection)
    assert FuseSparseTernary()(fused).modified
    got = run(fused, x, native)
    assert [y.shape for y in got] == [(3, 130), (3, 7)]
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("native", [True, False])
def test_matrices_without_a_mask_share_their_row(native):
    def build() -> ir.Model:
        text = f"h = Relu(x) {product('q', 'h', 'q', 128)} {product('k', 'h', 'k', 3)} {product('v', 'h', 'v', 3)}"
        return model(text, {"q": 128, "k": 3, "v": 3}, weights(q=128, k=3, v=3))

    x = np.random.default_rng(2).normal(size=(2, K)).astype(np.float32)
    fused = build()
    assert FuseSparseTernary()(fused).modified
    assert kinds(fused) == ["Relu", "SparseTernaryMatMul", "Split"]
    node = fused.graph.node(1)
    assert {name: a.value for name, a in node.attributes.items()} == {
        "k": K, "block": 0, "rescale": "none", "n": (128, 3, 3),
    }  # fmt: skip
    for a, b in zip(run(fused, x, native), run(build(), x, native), strict=True):
        np.testing.assert_array_equal(a, b)


def test_structure_names_and_metadata():
    graph = masked_pair(rescale="l2")
    for node in graph.graph:
        node.metadata_props["ai.qsparse.scope"] = "layer"
    FuseSparseTernary()(graph)
    assert kinds(graph) == ["SparseTernaryMatMul", "Split"]
    fused, split = graph.graph
    assert [value.name for value in fused.inputs if value] == ["x", "a.q+v.packed", "a.q+v.scale"]
    assert fused.attributes["rescale"].as_string() == "l2" and fused.attributes["n"].as_ints() == (130, 7)
    assert [node.metadata_props["ai.qsparse.scope"] for node in (fused, split)] == ["layer"] * 2
    assert set(graph.graph.initializers) == {"a.q+v.packed", "a.q+v.scale", "q+v.sizes"}
    assert [value.name for value in graph.graph.outputs] == ["q", "v"]


def test_one_matrix_behind_a_mask_needs_no_split_and_keeps_its_weights():
    graph = model(f"{mask()} {product('q', 'h', 'q', 130)}", {"q": 130}, weights(q=130))
    assert FuseSparseTernary()(graph).modified
    assert kinds(graph) == ["SparseTernaryMatMul"] and set(graph.graph.initializers) == {"a.q.packed", "a.q.scale"}


def test_twice_changes_nothing():
    graph = masked_pair()
    assert FuseSparseTernary()(graph).modified
    before = ir.to_proto(graph).SerializeToString()
    assert not FuseSparseTernary()(graph).modified
    assert ir.to_proto(graph).SerializeToString() == before


def test_no_weight_is_read():
    graph = masked_pair()

    def read() -> ir.TensorProtocol:
        raise AssertionError("a weight was read")

    for value in graph.graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None
        value.const_value = ir.LazyTensor(
            read, dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=value.name
        )
    assert FuseSparseTernary()(graph).modified


def unfused(text: str, outputs: dict[str, int], value: str, **matrices: int) -> str:
    """Asserts that nothing is fused, and returns why."""
    graph = model(text, outputs, weights(**matrices))
    before = ir.to_proto(graph).SerializeToString()
    values = {v.name: v for node in graph.graph for v in (*node.inputs, *node.outputs) if v is not None}
    reason = explain(graph.graph, values[value], TERNARY)
    assert not FuseSparseTernary()(graph).modified
    assert ir.to_proto(graph).SerializeToString() == before
    return reason


def test_what_does_not_match_says_why():
    q, v = product("q", "h", "q", 130), product("v", "h", "v", 7)
    assert unfused(product("q", "x", "q", 5), {"q": 5}, "x", q=5) == "no mask: nothing to share"
    masked_elsewhere = unfused(f"{mask()} {q} z = Relu(h)", {"q": 130, "z": K}, "h", q=130)
    assert masked_elsewhere == "something else reads the masked value"
    assert unfused(f"{mask()} {q}", {"q": 130, "h": K}, "h", q=130) == "something else reads the masked value"
    dense = unfused(f"{mask(k=K)} {q}", {"q": 130}, "h", q=130)
    assert dense == "the mask keeps every channel: another pass may drop it"
    between = f"{mask()} {q} {mask('other')} {v} z = Relu(other)"
    assert unfused(between, {"q": 130, "v": 7, "z": K}, "h", q=130, v=7) == "another custom op is called in between"
    tied = f"{mask()} {product('q', 'h', 'q', 5)} {product('v', 'h', 'q', 5)}"
    assert "is read elsewhere too" in unfused(tied, {"q": 5, "v": 5}, "h", q=5)


def test_computed_weights_are_left_alone():
    text = f"w = Identity(a_q_packed) {mask()} q = ai.qsparse.TernaryMatMul <n = 5> (h, w, a_q_scale)"
    assert unfused(text, {"q": 5}, "h", q=5) == "the weights are not initialisers of this graph"


def test_most_matrices():
    names = [f"m{i}" for i in range(65)]
    text = mask() + " ".join(f" {product(name, 'h', name, 1)}" for name in names)
    reason = unfused(text, dict.fromkeys(names, 1), "h", **dict.fromkeys(names, 1))
    assert reason == "65 matrices, and the kernel takes 64"
