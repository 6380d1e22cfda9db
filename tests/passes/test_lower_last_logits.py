"""last-logits: the last row of the same logits, for whatever head; graphs without such a head stay as they are."""

import dataclasses

import numpy as np
import pytest
from graph_text import graph_of, kinds, run, spelled

import qsparse_export as qs
from qsparse_export.config import ModelConfig, SparsityRule, TopK
from qsparse_export.errors import BundleError, UsageError
from qsparse_export.nn.decoder import Decoder
from qsparse_export.passes.lower_last_logits import LastLogits, explain

RANDOM = np.random.default_rng(0)
SIGNATURE = "(float[B, S, 8] h) => (float[B, S, 5] logits)"
HEAD = {
    "head": RANDOM.standard_normal((8, 5)).astype(np.float32),
    "bias": RANDOM.standard_normal(5).astype(np.float32),
}
TINY = ModelConfig("llama", 300, 32, 48, 2, 2, 1, 16, max_positions=64, sparsity=(SparsityRule("*", TopK(0.5)),))


@pytest.mark.parametrize(
    ("text", "after"),
    [
        ("logits = MatMul (h, head)", ["Slice", "MatMul"]),
        ("p = MatMul (h, head) logits = Add (p, bias)", ["Slice", "MatMul", "Add"]),
        ("p = MatMul (h, head) w = Cast <to = 11> (p) logits = Cast <to = 1> (w)", ["Slice", "MatMul", "Cast", "Cast"]),
    ],
)
def test_the_last_row_alone(text, after):
    graph = graph_of(SIGNATURE, text, {name: HEAD[name] for name in HEAD if name in text})
    h = RANDOM.standard_normal((2, 7, 8)).astype(np.float32)
    (every,) = run(graph, {"h": h}, False)
    assert LastLogits()(graph).modified and kinds(graph) == after
    assert list(graph.graph.outputs[0].shape) == ["B", 1, 5]
    (last,) = run(graph, {"h": h}, False)
    np.testing.assert_allclose(last, every[:, -1:], rtol=0, atol=8 * 2**-23 * np.abs(h).sum(-1).max())
    before = spelled(graph)
    assert not LastLogits()(graph).modified and spelled(graph) == before


@pytest.mark.parametrize(
    ("signature", "text", "names", "reason"),
    [
        ("(float[B, 8] h) => (float[B, 5] logits)", "logits = MatMul (h, head)", ["head"], "no output logits"),
        ("(float[B, S, 8] h) => (float[B, S, 5] y)", "y = MatMul (h, head)", ["head"], "no output logits"),
        (SIGNATURE, "p = MatMul (h, head) logits = Softmax <axis = 1> (p)", ["head"], "logits come from Softmax"),
        (
            "(float[B, S, 8] h, float[B, S, 5] other) => (float[B, S, 5] logits)",
            "p = MatMul (h, head) logits = Add (p, other)",
            ["head"],
            "logits come from Add",
        ),
        (
            "(float[B, S, 8] h) => (float[B, S, 5] logits, float[B, S, 5] p)",
            "p = MatMul (h, head) logits = Add (p, bias)",
            ["head", "bias"],
            "logits come from Add",
        ),
    ],
)
def test_what_is_no_head_is_left_alone(signature, text, names, reason):
    graph = graph_of(signature, text, {name: HEAD[name] for name in names})
    before = spelled(graph)
    assert reason in explain(graph.graph)
    assert not LastLogits()(graph).modified and spelled(graph) == before


@pytest.mark.parametrize("choices", [{}, {"weights": "int4"}, {"weights": "fp16"}])
def test_a_bundle_with_the_last_logits_generates_the_same(tmp_path, choices):
    decoder = Decoder(TINY)
    prompt = [1, 2, 3, 4, 5, 6, 7]
    every = qs.export(decoder, out=tmp_path / "all", **choices)
    last = qs.export(decoder, out=tmp_path / "last", logits="last", **choices)
    assert (every.manifest["logits"], last.manifest["logits"]) == ("all", "last")
    assert "last-logits" in last.manifest["pipeline"] and "last-logits" not in every.manifest["pipeline"]
    assert [path["path"] for path in last.manifest["parity"]["paths"]] == ["native", "bodies"]
    assert every.open().generate(prompt, 16).tokens == last.open().generate(prompt, 16).tokens
    with pytest.raises(BundleError, match="export it with --logits all"):
        last.open().perplexity(list(range(20)))


def test_with_a_tied_embedding(tmp_path):
    tied = dataclasses.replace(TINY, tied_embeddings=True)
    assert qs.export(Decoder(tied), out=tmp_path / "tied", logits="last", weights="int8").manifest["logits"] == "last"


def test_a_module_has_no_logits(tmp_path):
    import torch

    with pytest.raises(UsageError, match="--logits last needs a decoder"):
        qs.export(torch.nn.Linear(4, 4), example_inputs=(torch.zeros(2, 4),), logits="last", out=tmp_path / "linear")
    assert not list(tmp_path.iterdir())
