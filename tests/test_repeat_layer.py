"""A decoder traced with two layers and repeated is the decoder traced whole."""

import dataclasses
from collections import Counter

import pytest
import torch

import qsparse_export as qs
from qsparse_export import exporter, repeat_layer
from qsparse_export.config import ModelConfig, MoE, SparsityRule, TopK
from qsparse_export.nn.decoder import Decoder
from qsparse_export.repeat_layer import layers_to_trace
from qsparse_export.weights import StateDict

CONFIG = ModelConfig(
    architecture="qwen2",
    vocab_size=40,
    hidden_size=16,
    intermediate_size=26,
    layers=4,
    heads=2,
    kv_heads=1,
    head_dim=8,
    max_positions=64,
    qkv_bias=True,
    sparsity=(SparsityRule("*", TopK(0.4)), SparsityRule("model.layers.0.*", TopK(0.1))),
)
MOE = dataclasses.replace(CONFIG, quantization="bitnet", moe=MoE(experts=2, experts_per_token=1))


def described(config):
    """Nodes by op and attributes, values by name and shape at the border, and the scopes in order."""
    graph = exporter.decoder_graph(config, StateDict(Decoder(config).state_dict()), torch.float32).graph

    def border(values):
        return [(value.name, str(value.shape), str(value.dtype)) for value in values]

    nodes = Counter(
        (n.domain, n.op_type, str(sorted((a.name, str(a.value)) for a in n.attributes.values()))) for n in graph
    )
    scopes = list(dict.fromkeys(node.metadata_props.get("ai.qsparse.scope", "") for node in graph))
    weights = sorted((name, str(value.shape)) for name, value in graph.initializers.items())
    return border(graph.inputs), border(graph.outputs), weights, nodes, scopes


@pytest.mark.parametrize("config", [CONFIG, MOE], ids=["dense", "moe"])
def test_repeating_is_tracing(monkeypatch, config):
    repeated = described(config)
    monkeypatch.setattr(repeat_layer, "layers_to_trace", lambda config: config.layers)
    whole = described(config)
    for ours, theirs in zip(repeated, whole, strict=True):
        assert ours == theirs


def test_layers_with_masks_of_their_own_are_traced():
    assert layers_to_trace(CONFIG) == 2
    assert layers_to_trace(dataclasses.replace(CONFIG, layers=1)) == 1
    own = (*CONFIG.sparsity, SparsityRule("model.layers.3.mlp.down_proj", TopK(0.9)))
    assert layers_to_trace(dataclasses.replace(CONFIG, sparsity=own)) == 4


@pytest.mark.parametrize("config", [CONFIG, MOE], ids=["dense", "moe"])
def test_repeated_layers_have_their_own_weights(tmp_path, config):
    torch.manual_seed(0)
    parity = qs.export(Decoder(config), out=tmp_path / "b").manifest["parity"]
    assert all(path["greedy_agreement"] == 1.0 for path in parity["paths"])
