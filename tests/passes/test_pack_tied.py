"""pack-tied: equal weights are one tensor, near ones stay two; and what the exporter ties is in the file once."""

import dataclasses

import numpy as np
import pytest
import torch
from graph_text import graph_of, run, spelled

import qsparse_export as qs
from qsparse_export.config import ModelConfig
from qsparse_export.nn.decoder import Decoder
from qsparse_export.passes.pack_tied import PackTied

EMBEDDING = np.random.default_rng(0).standard_normal((50, 8)).astype(np.float32)
TEXT = "h = Gather (embedding, ids) y = Gemm <transB = 1> (h, head)"
SIGNATURE = "(int64[S] ids) => (float[S, 50] y)"


def test_equal_weights_become_one():
    graph = graph_of(SIGNATURE, TEXT, {"embedding": EMBEDDING, "head": EMBEDDING.copy()})
    feeds = {"ids": np.array([3, 7])}
    (expected,) = run(graph, feeds, False)
    assert PackTied()(graph).modified and len(graph.graph.initializers) == 1
    np.testing.assert_array_equal(run(graph, feeds, False)[0], expected)
    before = spelled(graph)
    assert not PackTied()(graph).modified and spelled(graph) == before


def test_weights_that_differ_in_one_bit_or_in_shape_stay_two():
    other = EMBEDDING.copy()
    other[49, 7] = np.nextafter(other[49, 7], np.float32(9))
    graph = graph_of(SIGNATURE, TEXT, {"embedding": EMBEDDING, "head": other})
    assert not PackTied()(graph).modified and len(graph.graph.initializers) == 2
    turned = graph_of(
        "(int64[S] ids) => (float[S, 8] h, float[S, 50] z)",
        "h = Gather (embedding, ids) z = Gather (flat, ids)",
        {"embedding": EMBEDDING, "flat": EMBEDDING.reshape(8, 50)},
    )
    assert not PackTied()(turned).modified


@pytest.mark.parametrize("weights", ["keep", "fp16"])
def test_a_tied_embedding_is_in_the_file_once(tmp_path, weights):
    config = ModelConfig("llama", 400, 16, 24, 1, 2, 1, 8, max_positions=32, tied_embeddings=True)
    bytes_of = {}
    for tied in (True, False):
        decoder = Decoder(dataclasses.replace(config, tied_embeddings=tied))
        bundle = qs.export(decoder, out=tmp_path / str(tied), weights=weights, verify="none")
        bytes_of[tied] = bundle.manifest["files"]["model.onnx.data"]["bytes"]
    matrix = 400 * 16 * (4 if weights == "keep" else 2)
    assert abs(bytes_of[False] - bytes_of[True] - matrix) < 128, (
        "the untied one has a second matrix, the tied one has not"
    )
    assert torch.is_tensor(decoder.model.embed_tokens.weight)
