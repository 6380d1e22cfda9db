"""fuse-attention: what it matches and what not, that twice is once, and that numbers and masks keep their meaning."""

import numpy as np
import pytest
from graph_text import graph_of, kinds, run, spelled

from qsparse_export.ops.cached_attention import SHARED_CACHE
from qsparse_export.passes.fuse_attention import FuseAttention, explain

HEADS, KV_HEADS, WIDTH = 4, 2, 8
SIZES = {"sizes": np.array([HEADS * WIDTH, KV_HEADS * WIDTH, KV_HEADS * WIDTH])}
SPLIT = "q, k, v = Split <axis = -1> (qkv, sizes)"
ROTARY = "rq = RotaryEmbedding <num_heads = 4> (q, cos, sin) rk = RotaryEmbedding <num_heads = 2> (k, cos, sin)"
ATTENTION = "y, nk, nv = Attention <q_num_heads = 4, kv_num_heads = 2> (rq, rk, v, mask, pk, pv)"
TEXT = f"{SPLIT} {ROTARY} {ATTENTION}"


def signature(dtype: str = "float", first: str = "", mask: str = "bool[B, 1, S, T] mask", outputs: str = "") -> str:
    qkv = first or f"{dtype}[B, S, 64] qkv"
    angles = f"{dtype}[B, S, 4] cos, {dtype}[B, S, 4] sin"
    past = f"{dtype}[B, 2, P, 8] pk, {dtype}[B, 2, P, 8] pv"
    more = f", {outputs}" if outputs else ""
    return f"({qkv}, {angles}, {mask}, {past}) => ({dtype}[B, S, 32] y, {dtype}[B, 2, N, 8] nk, {dtype}[B, 2, N, 8] nv{more})"


def feeds(tokens: int, past: int, dtype: type = np.float32) -> dict[str, np.ndarray]:
    """Two sequences, the second with three slots of left padding."""
    rng = np.random.default_rng(3)
    total = past + tokens
    queries = np.arange(past, total)[:, None]
    attended = np.ones((2, 1, 1, total), bool)
    attended[1, ..., :3] = False
    angles = rng.uniform(0, 6, (2, tokens, WIDTH // 2))
    cache = (2, KV_HEADS, past, WIDTH)
    return {
        "qkv": rng.standard_normal((2, tokens, 64)).astype(dtype),
        "cos": np.cos(angles).astype(dtype),
        "sin": np.sin(angles).astype(dtype),
        "mask": ((np.arange(total) <= queries) & attended) | (np.arange(total) == queries),
        "pk": rng.standard_normal(cache).astype(dtype),
        "pv": rng.standard_normal(cache).astype(dtype),
    }


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(("dtype", "kind"), [("float", np.float32), ("float16", np.float16)])
@pytest.mark.parametrize(("tokens", "past"), [(5, 0), (1, 6), (3, 4)])
def test_left_padded_batches_prefill_chunks_and_steps_keep_their_numbers(native, dtype, kind, tokens, past):
    graph = graph_of(signature(dtype), TEXT, SIZES)
    assert FuseAttention()(graph).modified
    assert kinds(graph) == ["CachedAttention"] and not graph.graph.initializers
    node = graph.graph[0]
    assert [value.name for value in node.inputs if value] == ["qkv", "cos", "sin", "mask", "pk", "pv"]
    assert {name: a.value for name, a in node.attributes.items()} == {"heads": HEADS, "kv_heads": KV_HEADS}
    given = feeds(tokens, past, kind)
    expected = run(graph_of(signature(dtype), TEXT, SIZES), given, False)
    for got, wanted in zip(run(graph, given, native), expected, strict=True):
        assert got.shape == wanted.shape and got.dtype == kind
        np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-6 if kind is np.float32 else 4e-3)


def test_three_products_are_joined():
    parts = "float[B, S, 32] q, float[B, S, 16] k, float[B, S, 16] v"
    graph = graph_of(signature(first=parts), f"{ROTARY} {ATTENTION}")
    assert FuseAttention()(graph).modified and kinds(graph) == ["Concat", "CachedAttention"]
    given = feeds(2, 3)
    split = dict(zip("qkv", np.split(given.pop("qkv"), [32, 48], axis=-1), strict=True))
    expected = run(graph_of(signature(first=parts), f"{ROTARY} {ATTENTION}"), split | given, False)
    for got, wanted in zip(run(graph, split | given, True), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-6)


def test_the_model_says_that_its_caches_may_be_one_buffer_only_when_all_may():
    graph = graph_of(signature(), TEXT, SIZES)
    FuseAttention()(graph)
    assert graph.metadata_props[SHARED_CACHE] == "true"
    two = f"{TEXT} z, mk, mv = Attention <q_num_heads = 4, kv_num_heads = 2> (qkv, qkv, qkv, mask, pk2, pv2)"
    other = ", float[B, 4, P, 16] pk2, float[B, 2, P, 32] pv2"
    made = signature(outputs="float[B, S, Z] z, float[B, 2, N, K] mk, float[B, 2, N, K] mv").replace(
        ") =>", f"{other}) =>"
    )
    mixed = graph_of(made, two, SIZES)
    assert FuseAttention()(mixed).modified and SHARED_CACHE not in mixed.metadata_props
    read = graph_of(signature(outputs="float[B, 2, P, 8] z"), f"{TEXT} z = Neg (pk)", SIZES)
    assert FuseAttention()(read).modified and SHARED_CACHE not in read.metadata_props


def test_twice_changes_nothing_and_the_flag_comes_back():
    graph = graph_of(signature(), TEXT, SIZES)
    for node in graph.graph:
        node.metadata_props["ai.qsparse.scope"] = "model.layers.0.self_attn"
    assert FuseAttention()(graph).modified
    before = spelled(graph)
    assert not FuseAttention()(graph).modified and spelled(graph) == before
    assert graph.graph[0].metadata_props["ai.qsparse.scope"] == "model.layers.0.self_attn"
    graph.metadata_props.clear()  # as annotate-scope does with what it does not know
    assert FuseAttention()(graph).modified and graph.metadata_props[SHARED_CACHE] == "true"


def unfused(text: str, made: str | None = None) -> str:
    """Asserts that nothing is fused, and returns why."""
    graph = graph_of(made or signature(), text, SIZES)
    before = spelled(graph)
    reason = explain(next(node for node in graph.graph if node.op_type == "Attention"))
    assert not FuseAttention()(graph).modified and spelled(graph) == before
    return reason


def test_what_does_not_match_says_why():
    causal = ATTENTION.replace("kv_num_heads = 2>", "kv_num_heads = 2, is_causal = 1>")
    for changed in (
        causal,
        causal.replace("is_causal = 1", "scale = 0.5"),
        causal.replace("is_causal = 1", "softcap = 9.0"),
    ):
        assert unfused(f"{SPLIT} {ROTARY} {changed}") == "it caps, scales or masks in another way than the kernel"
    plain = f"{SPLIT} rk = RotaryEmbedding <num_heads = 2> (k, cos, sin) {ATTENTION.replace('(rq', '(q')}"
    assert unfused(plain) == "queries and keys do not both come from RotaryEmbedding"
    interleaved = TEXT.replace("num_heads = 2> (k", "num_heads = 2, interleaved = 1> (k")
    assert "are interleaved, partial" in unfused(interleaved)
    assert unfused(TEXT.replace("(k, cos, sin)", "(k, cos, cos)")) == "queries and keys are turned by different angles"
    read = signature(outputs="float[B, S, 16] rk")
    assert unfused(TEXT, read) == "turned queries or keys are read elsewhere too"
    additive = signature(mask="float[B, 1, S, T] mask")
    assert unfused(TEXT, additive) == "its mask is not a boolean one for each sequence and all heads"
    shared = signature(mask="bool[1, 1, S, T] mask")
    assert unfused(TEXT, shared) == "its mask is not a boolean one for each sequence and all heads"
    no_cache = f"{SPLIT} {ROTARY} y = Attention <q_num_heads = 4, kv_num_heads = 2> (rq, rk, v, mask) nk = Neg (pk) nv = Neg (pv)"
    assert unfused(no_cache) == "it has no boolean mask, no KV cache, or a padding length"
    scores = ATTENTION.replace("nv =", "nv, z =")
    made = signature(outputs="float[B, 4, S, T] z")
    assert unfused(f"{SPLIT} {ROTARY} {scores}", made) == "its scores are read"


def test_a_scale_that_is_the_default_matches():
    scaled = TEXT.replace("kv_num_heads = 2> (rq", "kv_num_heads = 2, scale = 0.35355338> (rq")
    graph = graph_of(signature(), scaled, SIZES)
    assert FuseAttention()(graph).modified and kinds(graph) == ["CachedAttention"]
