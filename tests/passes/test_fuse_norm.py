"""fuse-norm: what it matches and what not, that twice is once, and that the numbers stay."""

import numpy as np
import onnx_ir as ir
import pytest
from graph_text import graph_of, kinds, run, spelled

from qsparse_export.passes.fuse_norm import FuseNorm, explain

WEIGHT = {"weight": np.linspace(0.5, 2, 6).astype(np.float32)}
NORM = "s = Add (x, r) y = RMSNormalization <axis = -1, epsilon = 0.001> (s, weight)"


def norm(text: str = NORM, dtype: str = "float", outputs: str = "", weight: np.ndarray = WEIGHT["weight"]) -> ir.Model:
    more = f", {outputs}" if outputs else ""
    signature = f"({dtype}[M, 6] x, {dtype}[M, 6] r) => ({dtype}[M, 6] y{more})"
    kind = np.float16 if dtype == "float16" else np.float32
    return graph_of(signature, text, {"weight": weight.astype(kind)})


def feeds(dtype: type = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal((3, 6)).astype(dtype) for name in ("x", "r")}


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_sum_and_norm_become_one_node_and_the_sum_stays(native, dtype):
    kind = np.float16 if dtype == "float16" else np.float32
    outputs = f"{dtype}[M, 6] s, {dtype}[M, 6] z"
    text = NORM + " z = Neg (s)"
    expected = run(norm(text, dtype, outputs), feeds(kind), native)
    graph = norm(text, dtype, outputs)
    assert FuseNorm()(graph).modified and kinds(graph) == ["AddRmsNorm", "Neg"]
    fused = graph.graph[0]
    assert [value.name for value in fused.outputs] == ["s", "y"]
    assert fused.attributes["epsilon"].as_float() == pytest.approx(0.001)
    for got, wanted in zip(run(graph, feeds(kind), native), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2e-6 if dtype == "float" else 2e-3, atol=1e-6)


def test_a_norm_without_an_epsilon_has_the_standards():
    graph = norm("s = Add (x, r) y = RMSNormalization <axis = -1> (s, weight)")
    assert FuseNorm()(graph).modified
    assert graph.graph[0].attributes["epsilon"].as_float() == pytest.approx(1e-5)


def test_twice_changes_nothing_and_the_scope_is_the_sums():
    """The sum is what a decoder layer gives, and verification finds that by its scope, as the node's first output."""
    graph = norm()
    for node, scope in zip(graph.graph, ("model.layers.0", "model.layers.1.input_layernorm"), strict=True):
        node.metadata_props["ai.qsparse.scope"] = scope
    assert FuseNorm()(graph).modified
    before = spelled(graph)
    assert not FuseNorm()(graph).modified and spelled(graph) == before
    assert graph.graph[0].metadata_props["ai.qsparse.scope"] == "model.layers.0"


def unfused(graph: ir.Model) -> str:
    """Asserts that nothing is fused, and returns why."""
    before = spelled(graph)
    reason = explain(next(node for node in graph.graph if node.op_type == "RMSNormalization"))
    assert not FuseNorm()(graph).modified and spelled(graph) == before
    return reason


def test_what_does_not_match_says_why():
    assert unfused(norm("s = Mul (x, r) y = RMSNormalization <axis = -1> (s, weight)")) == "what it reads is no sum"
    broadcast = norm("s = Add (x, weight) y = RMSNormalization <axis = -1> (s, weight)")
    assert unfused(broadcast) == "the sum broadcasts, or its shapes are not known"
    first = "s = Add (x, r) y = RMSNormalization <axis = 0> (s, w)"
    over_all = graph_of("(float[3, 6] x, float[3, 6] r) => (float[3, 6] y)", first, {"w": np.ones((3, 6), np.float32)})
    assert unfused(over_all) == "it is not over the last axis alone"
    computed = norm("s = Add (x, r) w = Neg (weight) y = RMSNormalization <axis = -1> (s, w)")
    assert unfused(computed) == "the weight is computed"
    assert unfused(norm(weight=np.ones(1))) == "the weight is not one number for each channel"
    narrow = norm("s = Add (x, r) y = RMSNormalization <axis = -1, stash_type = 10> (s, weight)", "float16")
    assert unfused(narrow) == "it is not computed in float32"
