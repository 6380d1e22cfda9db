"""lower-experts: a mixture of experts without NonZero gives the same rows; what is not one is left alone; twice is once."""

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
import torch
from graph_text import graph_of, kinds, run, spelled

from qsparse_export.config import ModelConfig, MoE, SparsityRule, TopK
from qsparse_export.exporter import decoder_graph
from qsparse_export.guided import choice_taps
from qsparse_export.nn.decoder import Decoder
from qsparse_export.passes.base import parse_pipeline
from qsparse_export.passes.lower_experts import LowerExperts, explain
from qsparse_export.passes.lower_inline_bodies import InlineBodies
from qsparse_export.passes.pipelines import DEFAULT, FUSE_NATIVE, foreign_pipeline_for, pipeline_for
from qsparse_export.weights import StateDict

WIDTH, INNER, EXPERTS = 6, 10, 3
ROUTER = """
k = Constant <value = int64[1] {2}> () last = Constant <value = int64[1] {-1}> () zero = Constant <value = float {0.0}> ()
chances = Softmax <axis = -1> (z) best, places = TopK <axis = -1> (chances, k)
total = ReduceSum <keepdims = 1> (best, last) shares = Div (best, total)
z_shape = Shape (z) empty = Expand (zero, z_shape) weights = ScatterElements <axis = -1> (empty, places, shares)
width = Constant <value = int64[1] {6}> () x_shape = Shape (x) y0 = Expand (zero, x_shape)
"""
EXPERT = """
begin{e} = Constant <value = int64[1] {{{e}}}> () end{e} = Constant <value = int64[1] {{{n}}}> ()
part{e} = Slice (weights, begin{e}, end{e}, last) w{e} = Squeeze (part{e}, last)
found{e} = NonZero (w{e}) turned{e} = Transpose <perm = [1, 0]> (found{e}) rows{e} = Squeeze (turned{e}, last)
h{e} = Gather <axis = 0> (x, rows{e}) u{e} = MatMul (h{e}, up{e}) g{e} = Relu (u{e})
o{e} = ai.qsparse.SparseMatMul <k = 4, block = 0, rescale = "none", n = [6]> (g{e}, down{e})
s{e} = Gather <axis = 0> (w{e}, rows{e}) c{e} = Unsqueeze (s{e}, last) m{e} = Mul (o{e}, c{e})
q{e} = Unsqueeze (rows{e}, last) count{e} = Shape (rows{e}) places{e} = Concat <axis = 0> (count{e}, width)
p{e} = Expand (q{e}, places{e})
y{n} = ScatterElements <axis = 0, reduction = "add"> (y{e}, p{e}, m{e})
"""
TEXT = ROUTER + "".join(EXPERT.format(e=e, n=e + 1) for e in range(EXPERTS))
UNLIKELY = np.array([0.0, 0.5, -9.0])
"""Logits of the experts, in which the last is never among two."""


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    shapes = {"up": (WIDTH, INNER), "down": (INNER, WIDTH)}
    return {
        f"{name}{e}": rng.standard_normal(shape).astype(np.float32)
        for e in range(EXPERTS)
        for name, shape in shapes.items()
    }


def graph(
    text: str = TEXT, given: dict[str, np.ndarray] | None = None, inputs: str = "", outputs: str = "float[T, 6] y3"
) -> ir.Model:
    return graph_of(f"(float[T, 6] x, float[T, 3] z{inputs}) => ({outputs})", text, given or weights())


def rows(tokens: int = 7) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(tokens)
    x, z = (rng.standard_normal((tokens, width)).astype(np.float32) for width in (WIDTH, EXPERTS))
    return {"x": x, "z": z}


def lowered(made: ir.Model) -> ir.Model:
    assert LowerExperts()(made).modified
    assert {"NonZero", "ScatterElements", "TopK", "Gather", "Transpose"}.isdisjoint(kinds(made))
    return made


def same(feeds: dict[str, np.ndarray], given: dict[str, np.ndarray] | None = None, text: str = TEXT) -> np.ndarray:
    """Asserts that lowering changes no row of the result, which is returned."""
    (expected,), (got,) = (run(made, feeds, False) for made in (graph(text, given), lowered(graph(text, given))))
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)
    return got


@pytest.mark.parametrize("tokens", [1, 2, 7, 40])
def test_the_same_rows(tokens):
    same(rows(tokens))


def test_an_expert_that_nobody_chose():
    feeds = rows(5)
    feeds["z"] = np.tile(UNLIKELY, (5, 1)).astype(np.float32)
    given = weights()
    assert np.isfinite(same(feeds, given | {"down2": given["down2"] * np.nan})).all()


def test_of_equal_chances_the_lowest_number_is_chosen():
    feeds = rows(4)
    feeds["z"] = np.array([[0, 0, 0], [1, 2, 1], [1, 1, 2], [3, 1, 1]], np.float32)
    y = same(feeds)
    spoiled = weights()
    spoiled["down2"] = spoiled["down2"] * np.nan
    assert np.isnan(same(feeds, spoiled)).any(1).tolist() == [False, False, True, False]
    assert np.isfinite(y).all()


def test_a_chance_of_zero_counts_as_none():
    feeds = rows(3)
    feeds["z"] = np.array([[200, -200, -200]] * 3, np.float32)
    given = weights()
    assert np.isfinite(same(feeds, given | {"down1": given["down1"] * np.inf})).all()


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_stays_in_its_row(number):
    feeds = rows(6)
    feeds["x"][2] = number
    clean = same(rows(6))
    y = same(feeds)
    assert not np.isfinite(y[2]).all()
    np.testing.assert_allclose(np.delete(y, 2, 0), np.delete(clean, 2, 0), rtol=1e-6, atol=1e-7)


def test_a_router_without_a_number_spoils_its_row_alone():
    feeds = rows(6)
    feeds["z"][4, 1] = np.nan
    (y,) = run(lowered(graph()), feeds, False)
    assert np.isnan(y[4]).all()
    np.testing.assert_allclose(np.delete(y, 4, 0), np.delete(same(rows(6)), 4, 0), rtol=1e-6, atol=1e-7)


def test_weights_that_are_not_divided_by_their_sum():
    text = TEXT.replace("total = ReduceSum <keepdims = 1> (best, last) shares = Div (best, total)", "")
    text = text.replace("places, shares)", "places, best)")
    same(rows(), text=text)
    made = lowered(graph(text))
    assert kinds(made).count("TopKSparsify") == 1 and {"Div", "ReduceSum"}.isdisjoint(kinds(made))


EXPERTS_OF_ROWS = {
    "norm": ("g0 = Relu (u0)", "v0 = RMSNormalization <axis = -1> (u0, scale) g0 = Relu (v0)"),
    "bias": ("u0 = MatMul (h0, up0)", "v0 = MatMul (h0, up0) u0 = Add (bias, v0)"),
    "gemm": ("u0 = MatMul (h0, up0)", "u0 = Gemm (h0, up0, bias)"),
    "silu": ("g0 = Relu (u0)", "v0 = Sigmoid (u0) g0 = Mul (u0, v0)"),
    "split": (
        "u0 = MatMul (h0, up0) g0 = Relu (u0)",
        "u0 = MatMul (h0, both) a0, b0 = Split <axis = 1, num_outputs = 2> (u0) g0 = Mul (a0, b0)",
    ),
    "mask": ("g0 = Relu (u0)", 'g0 = ai.qsparse.TopKSparsify <k = 3, block = 0, rescale = "none"> (u0)'),
}


@pytest.mark.parametrize("name", EXPERTS_OF_ROWS)
def test_what_an_expert_may_be_made_of(name):
    rng = np.random.default_rng(8)
    given = weights() | {each: rng.random(INNER).astype(np.float32) for each in ("scale", "bias")}
    given["both"] = rng.standard_normal((WIDTH, 2 * INNER)).astype(np.float32)
    same(rows(9), given, TEXT.replace(*EXPERTS_OF_ROWS[name]))


def test_weights_are_read_as_they_are_and_names_of_results_stay():
    made = lowered(graph())
    assert [value.name for value in made.graph.outputs] == ["y3"]
    assert made.graph.outputs[0].shape == ir.Shape(["T", 6])
    assert set(made.graph.initializers) == set(weights())
    names = [value.name for node in made.graph for value in node.outputs]
    assert len(set(names)) == len(names)


def test_twice_changes_nothing():
    made = lowered(graph())
    before = spelled(made)
    assert not LowerExperts()(made).modified and spelled(made) == before


def test_verification_follows_the_experts_in_their_rows_and_not_the_router():
    made = lowered(graph())
    taps = choice_taps(made)
    assert [(tap.op, tap.value, tap.rows) for tap in taps] == [
        ("TopKSparsify", f"g{e}", f"y{e + 1}.is_chosen.2") for e in range(EXPERTS)
    ]
    values = {
        "g0": np.arange(40, dtype=np.float32).reshape(4, 10),
        "y1.is_chosen.2": np.array([[1], [0], [0], [1]], bool),
    }
    np.testing.assert_array_equal(taps[0].choice_in(values), taps[0].choice(values["g0"][[0, 3]]))
    assert InlineBodies()(made).modified
    assert choice_taps(made) == taps


def left_alone(made: ir.Model, expert: int = 0) -> str:
    """Asserts that NonZero of this expert stays, and returns why."""
    scatter = next(node for node in made.graph if node.outputs[0].name == f"y{expert + 1}")
    reason = explain(scatter)
    LowerExperts()(made)
    assert f"found{expert}" in {node.outputs[0].name for node in made.graph}
    return reason


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("g0 = Relu (u0)", "g0 = Softmax <axis = 0> (u0)", "Softmax g0 may mix rows"),
        ("g0 = Relu (u0)", "g0 = CumSum (u0, i)", "CumSum g0 may mix rows"),
        ("u0 = MatMul (h0, up0)", "r0 = Transpose (h0) i0 = MatMul (r0, h0) u0 = MatMul (h0, i0)", "may mix rows"),
        ("u0 = MatMul (h0, up0)", "v0 = MatMul (h0, up0) u0 = Add (v0, five)", "Add u0 may mix rows"),
        ("c0 = Unsqueeze (s0, last)", "c0 = Unsqueeze (s0, i)", "Unsqueeze c0 may mix rows"),
        ("u0 = MatMul (h0, up0)", "v0 = MatMul (h0, up0) u0 = Add (v0, b)", "b is neither a weight nor of these rows"),
        ("u0 = MatMul (h0, up0)", "u0 = MatMul (h0, up0) spy = Identity (u0)", "u0 is read elsewhere too"),
        ("p0 = Expand", "spy = Identity (m0) p0 = Expand", "m0 is read elsewhere too"),
        ("h0 = Gather <axis = 0> (x, rows0)", "h0 = Gather <axis = 0> (t, rows0)", "t is not known to have as many rows"),
        ("found0 = NonZero (w0)", "v0 = NonZero (w0) found0 = Gather <axis = 0> (v0, i1)", "the places are not where"),
        ("q0 = Unsqueeze (rows0, last)", "v0 = Neg (rows0) q0 = Unsqueeze (v0, last)", "the places are not where"),
        ('y1 = ScatterElements <axis = 0, reduction = "add">', 'y1 = ScatterElements <reduction = "max">', "nothing is added"),
        ('<axis = 0, reduction = "add"> (y0', '<axis = 1, reduction = "add"> (y0', "places are not those of axis 0"),
        ("p0 = Expand (q0, places0)", "p0 = Concat <axis = 1> (q0, q0, q0, q0, q0, q0)", "the places are not where"),
    ],
)  # fmt: skip
def test_what_is_no_expert_says_why(old, new, reason):
    assert TEXT.count(old) == 1
    spied = "spy = Identity" in new
    outputs = "float[T, 6] y3" + (f", float[N, {INNER if 'u0)' in new else WIDTH}] spy" if spied else "")
    given = weights() | {"i": np.array(0), "i1": np.array([0]), "five": np.ones((5, INNER), np.float32)}
    made = graph(TEXT.replace(old, new), given, ", float[N, 10] b, float[S, 6] t", outputs)
    assert reason in left_alone(made)


def test_other_experts_are_lowered_all_the_same():
    text = TEXT.replace("g1 = Relu (u1)", "g1 = Softmax <axis = 0> (u1)")
    made = graph(text)
    assert left_alone(made, 1) == "Softmax g1 may mix rows"
    assert kinds(made).count("NonZero") == kinds(made).count("ScatterElements") == 1
    (expected,), (got,) = (run(each, rows(), False) for each in (graph(text), made))
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)


def test_two_experts_of_one_choice_keep_their_own_rows():
    text = TEXT.replace("h1 = Gather <axis = 0> (x, rows1)", "h1 = Gather <axis = 0> (x, rows0)")
    assert "Gather h1 may mix rows" in left_alone(graph(text), 1) or "neither" in left_alone(graph(text), 1)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Softmax <axis = -1>", "Sigmoid"),
        ("Softmax <axis = -1>", "Softmax <axis = 0>"),
        ("TopK <axis = -1>", "TopK <axis = -1, largest = 0>"),
        ("zero = Constant <value = float {0.0}>", "zero = Constant <value = float {1.0}>"),
        ("(empty, places, shares)", "(empty, places, chances)"),
        ("ReduceSum <keepdims = 1> (best, last)", "ReduceSum <keepdims = 1> (best)"),
        ("ReduceSum <keepdims = 1> (best, last)", "ReduceMax <keepdims = 1> (best, last)"),
        ("ScatterElements <axis = -1>", 'ScatterElements <axis = -1, reduction = "max">'),
    ],
)
def test_another_router_stays_and_its_experts_are_lowered(old, new):
    made = graph(TEXT.replace(old, new, 1))
    assert LowerExperts()(made).modified
    assert kinds(made).count("TopK") == kinds(made).count("ScatterElements") == 1 and "NonZero" not in kinds(made)
    if "chances)" not in new:  # which is no valid scatter: only the router's matcher sees it
        (expected,), (got,) = (run(each, rows(), False) for each in (graph(TEXT.replace(old, new, 1)), made))
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


TINY = ModelConfig(
    architecture="llama",
    vocab_size=40,
    hidden_size=16,
    intermediate_size=26,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=8,
    max_positions=64,
    moe=MoE(experts=3, experts_per_token=2),
    sparsity=(SparsityRule("*", TopK(0.4)),),
)
DECODERS = {
    "float": TINY,
    "plain": dataclasses.replace(TINY, moe=MoE(experts=4, experts_per_token=1, normalize=False), mlp_bias=True),
    "bitnet": dataclasses.replace(TINY, quantization="bitnet", sub_norms=True, activation="relu2"),
    "dense": dataclasses.replace(TINY, sparsity=()),
}


@pytest.mark.parametrize("name", DECODERS)
def test_whole_decoders_compute_the_same_without_it(name):
    torch.manual_seed(0)
    weights = StateDict(Decoder(DECODERS[name]).state_dict())
    feeds = {
        "input_ids": np.arange(8).reshape(2, 4) * 3,
        "attention_mask": np.ones((2, 6), np.int64),
        "position_ids": np.tile(np.arange(2, 6), (2, 1)),
    }
    caches = [f"past_key_values.{i}.{part}" for i in range(2) for part in ("key", "value")]
    feeds |= {name: np.full((2, 1, 2, 8), 0.1, np.float32) for name in caches}
    results = []
    for spec in (DEFAULT, pipeline_for(FUSE_NATIVE.values(), lacking_ops={"NonZero"})):
        made = decoder_graph(DECODERS[name], weights, torch.float32)
        for step in parse_pipeline(spec):
            step(made)
        results.append(run(made, feeds, True))
        lacks = spec != DEFAULT
        assert (
            ("NonZero" in kinds(made)) == ("ScatterElements" in kinds(made)) == ("TopK" in kinds(made)) == (not lacks)
        )
        if lacks:
            assert not LowerExperts()(made).modified
    for got, wanted in zip(*results, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_only_where_nothing_runs_nonzero_is_it_in_a_default_pipeline():
    for make in (pipeline_for, foreign_pipeline_for):
        steps = make(FUSE_NATIVE.values(), lacking_ops={"NonZero"}).split(",")
        at = steps.index("lower-experts")
        assert steps[at - 1] == "infer-shapes" and steps[at + 1] == "attach-bodies"
        assert "lower-experts" not in make(FUSE_NATIVE.values())
