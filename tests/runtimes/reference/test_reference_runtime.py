"""Whole graphs on ONNX's own evaluator: an independent judge of the exporter and of the function bodies."""

import dataclasses

import pytest
import torch

import qsparse_export as qs
from qsparse_export.config import ModelConfig, SparsityRule, TopK
from qsparse_export.nn.decoder import Decoder

SPARSE = ModelConfig(
    architecture="llama",
    vocab_size=40,
    hidden_size=16,
    intermediate_size=26,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=8,
    max_positions=64,
    tied_embeddings=True,
    sparsity=(SparsityRule("*", TopK(0.4)),),
)
BITNET = dataclasses.replace(SPARSE, quantization="bitnet", activation="relu2", sub_norms=True)


@pytest.mark.parametrize("config", [SPARSE, BITNET], ids=["sparse", "bitnet"])
def test_the_graph_means_the_same_to_onnx_itself(tmp_path, config):
    torch.manual_seed(0)
    bundle = qs.export(Decoder(config), out=tmp_path / "b", runtime="reference", verify="full")
    native, bodies = bundle.manifest["parity"]["paths"]
    assert native["greedy_agreement"] == bodies["greedy_agreement"] == 1.0
    assert native["native_calls"] and all(set(variants) == {"numpy"} for variants in native["native_calls"].values())
    assert not [name for name in bundle.manifest["files"] if name.endswith(".so")]
    ort = qs.export(Decoder(config), out=tmp_path / "o", verify="none")
    assert ort.manifest["pipeline"] == bundle.manifest["pipeline"]
