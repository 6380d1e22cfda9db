"""fuse-glu: what it matches and what not, that twice is once, and that the numbers stay."""

import numpy as np
import onnx_ir as ir
import pytest
from graph_text import graph_of, kinds, run, spelled

from qsparse_export.passes.fuse_glu import FuseGlu, explain

SPLIT = "gate, up = Split <axis = -1, num_outputs = 2> (x)"
TWO = "two = Constant <value = float {2.0}> ()"
RELU2 = f"{TWO} r = Relu (gate) p = Pow (r, two) y = Mul (p, up)"
SPELLINGS = {
    "pow": ("relu2", RELU2),
    "square": ("relu2", "r = Relu (gate) p = Mul (r, r) y = Mul (p, up)"),
    "up first": ("relu2", "r = Relu (gate) p = Mul (r, r) y = Mul (up, p)"),
    "silu": ("silu", "s = Sigmoid (gate) a = Mul (gate, s) y = Mul (a, up)"),
    "sigmoid first": ("silu", "s = Sigmoid (gate) a = Mul (s, gate) y = Mul (up, a)"),
}
CASTS = "g = Cast <to = 1> (gate) u = Cast <to = 1> (up) r = Relu (g) p = Mul (r, r) y = Mul (p, u)"


def glu(text: str, dtype: str = "float", out: str = "float", outputs: str = "") -> ir.Model:
    more = f", {outputs}" if outputs else ""
    return graph_of(f"({dtype}[M, 14] x) => ({out}[M, 7] y{more})", text)


def feed(dtype: type = np.float32) -> dict[str, np.ndarray]:
    return {"x": (np.random.default_rng(0).standard_normal((3, 14)) * 5).astype(dtype)}


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_become_one_node_with_the_same_numbers(spelling, native):
    activation, text = SPELLINGS[spelling]
    graph = glu(f"{SPLIT} {text}")
    (expected,) = run(glu(f"{SPLIT} {text}"), feed(), native)
    assert FuseGlu()(graph).modified
    fused = [node for node in graph.graph if node.op_type != "Constant"]
    assert [node.op_type for node in fused] == ["GatedActivation"]
    assert fused[0].attributes["activation"].as_string() == activation and graph.graph.outputs[0].name == "y"
    (got,) = run(graph, feed(), native)
    if activation == "relu2":
        np.testing.assert_array_equal(got, expected)
    else:  # the original's Sigmoid is off by 1e-7
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("native", [True, False])
def test_float16_with_casts_is_read_as_it_is(native):
    graph = glu(f"{SPLIT} {CASTS}", "float16")
    (expected,) = run(glu(f"{SPLIT} {CASTS}", "float16"), feed(np.float16), native)
    assert FuseGlu()(graph).modified and kinds(graph) == ["GatedActivation"]
    (got,) = run(graph, feed(np.float16), native)
    np.testing.assert_array_equal(got, expected)


def test_a_product_that_was_rounded_to_float16_is_rounded_again():
    text = f"{SPLIT} {SPELLINGS['silu'][1]}"
    graph = glu(text, "float16", "float16")
    (expected,) = run(glu(text, "float16", "float16"), feed(np.float16), True)
    assert FuseGlu()(graph).modified and kinds(graph) == ["GatedActivation", "Cast"]
    (got,) = run(graph, feed(np.float16), True)
    assert got.dtype == np.float16
    np.testing.assert_allclose(got.astype(np.float32), expected, rtol=3e-3, atol=1e-3)


def test_sizes_that_nobody_else_reads_go_with_the_split():
    signature = "(float[M, 14] x) => (float[M, 7] y)"
    text = f"gate, up = Split <axis = -1> (x, sizes) {SPELLINGS['square'][1]}"
    graph = graph_of(signature, text, {"sizes": np.array([7, 7])})
    assert FuseGlu()(graph).modified and not graph.graph.initializers


def test_twice_changes_nothing_and_the_scope_stays():
    graph = glu(f"{SPLIT} {RELU2}")
    for node in graph.graph:
        node.metadata_props["ai.qsparse.scope"] = "model.layers.0.mlp"
    assert FuseGlu()(graph).modified
    before = spelled(graph)
    assert not FuseGlu()(graph).modified and spelled(graph) == before
    assert graph.graph[-1].metadata_props["ai.qsparse.scope"] == "model.layers.0.mlp"


def unfused(graph: ir.Model, value: str = "y") -> str:
    """Asserts that nothing is fused, and returns why."""
    before = spelled(graph)
    node = next(node for node in graph.graph if any(output.name == value for output in node.outputs))
    reason = explain(node)
    assert not FuseGlu()(graph).modified and spelled(graph) == before
    return reason


def test_what_does_not_match_says_why():
    signature = "(float[M, 14] x, float[M, 7] gate) => (float[M, 7] y)"
    alone = graph_of(
        signature, "g, up = Split <axis = -1, num_outputs = 2> (x) r = Relu (gate) p = Mul (r, r) y = Mul (p, up)"
    )
    assert "come from two nodes" in unfused(alone)
    swapped = f"up, gate = Split <axis = -1, num_outputs = 2> (x) {RELU2}"
    assert "does not give the gate first" in unfused(glu(swapped))
    assert unfused(glu(f"{SPLIT} {RELU2}", outputs="float[M, 7] r")) == "r is read elsewhere too"
    assert unfused(glu(f"{SPLIT} {RELU2} z = Neg (gate)", outputs="float[M, 7] z")) == "gate is read elsewhere too"
    cubed = RELU2.replace("2.0", "3.0")
    assert unfused(glu(f"{SPLIT} {cubed}")) == "neither side is a squared ReLU or a SiLU"
    other = f"{SPLIT} s = Sigmoid (up) a = Mul (gate, s) y = Mul (a, up)"
    assert unfused(glu(other)) == "neither side is a squared ReLU or a SiLU"
    uneven = graph_of(
        "(float[M, 8] x) => (float[M, Y] y)",
        "gate, up = Split <axis = -1> (x, sizes) r = Relu (gate) p = Mul (r, r) y = Mul (p, up)",
        {"sizes": np.array([7, 1])},
    )
    assert unfused(uneven) == "gate and up are 7 and 1 wide"
    rows = graph_of(
        "(float[4, 7] x) => (float[2, 7] y)",
        "gate, up = Split <axis = 0, num_outputs = 2> (x) r = Relu (gate) p = Mul (r, r) y = Mul (p, up)",
    )
    assert unfused(rows) == "the Split is not along the last axis"
    wide = graph_of("(double[M, 14] x) => (double[M, 7] y)", f"{SPLIT} r = Relu (gate) p = Mul (r, r) y = Mul (p, up)")
    assert unfused(wide) == "the kernel takes no DOUBLE"
