"""decompose: ONNX's own definitions in place of ops that a runtime lacks."""

import numpy as np
import pytest
from graph_text import graph_of, kinds, run, spelled

from qsparse_export.errors import UsageError
from qsparse_export.passes.lower_decompose import Decompose

NORM = "y = RMSNormalization <axis = -1, epsilon = 0.01> (x, w)"
W = {"w": np.linspace(0.5, 2, 8).astype(np.float32)}
ATTENTION = (
    "q = RotaryEmbedding <num_heads = 2> (x, cos, sin) k = RotaryEmbedding <num_heads = 1> (x1, cos, sin) "
    "y, nk, nv = Attention <q_num_heads = 2, kv_num_heads = 1> (q, k, x1, mask, pk, pv)"
)
SIGNATURE = (
    "(float[1, 3, 16] x, float[1, 3, 8] x1, float[1, 3, 4] cos, float[1, 3, 4] sin, bool[1, 1, 3, 5] mask, "
    "float[1, 1, 2, 8] pk, float[1, 1, 2, 8] pv) => (float[1, 3, 16] y, float[1, 1, 5, 8] nk, float[1, 1, 5, 8] nv)"
)


def test_a_norm_becomes_what_its_schema_says():
    feeds = {"x": np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)}
    graph = graph_of("(float[M, 8] x) => (float[M, 8] y)", NORM, W)
    graph.graph[0].metadata_props["ai.qsparse.scope"] = "model.norm"
    (expected,) = run(graph_of("(float[M, 8] x) => (float[M, 8] y)", NORM, W), feeds, False)
    assert Decompose()(graph).modified and "RMSNormalization" not in kinds(graph) and len(kinds(graph)) > 3
    assert {node.metadata_props["ai.qsparse.scope"] for node in graph.graph} == {"model.norm"}
    np.testing.assert_allclose(run(graph, feeds, False)[0], expected, rtol=1e-5)
    before = spelled(graph)
    assert not Decompose()(graph).modified and spelled(graph) == before


def test_attention_with_its_cache_and_rotary_positions():
    rng = np.random.default_rng(1)
    shapes = {
        "x": (1, 3, 16),
        "x1": (1, 3, 8),
        "cos": (1, 3, 4),
        "sin": (1, 3, 4),
        "pk": (1, 1, 2, 8),
        "pv": (1, 1, 2, 8),
    }
    feeds = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    feeds["mask"] = np.tril(np.ones((3, 5), bool), 2)[None, None]
    graph = graph_of(SIGNATURE, ATTENTION)
    expected = run(graph_of(SIGNATURE, ATTENTION), feeds, False)
    assert Decompose()(graph).modified
    assert not {"Attention", "RotaryEmbedding"} & set(kinds(graph))
    for got, wanted in zip(run(graph, feeds, False), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_only_the_named_ops_and_only_those_with_a_definition():
    graph = graph_of("(float[M, 8] x) => (float[M, 8] y)", NORM, W)
    before = spelled(graph)
    assert not Decompose(ops="Attention")(graph).modified and spelled(graph) == before
    with pytest.raises(UsageError, match="ONNX defines MatMul by words alone"):
        Decompose(ops="MatMul")(graph)
    with pytest.raises(UsageError, match="ONNX has no op 'RMSNorm' in opset 23"):
        Decompose(ops="RMSNorm")(graph)
