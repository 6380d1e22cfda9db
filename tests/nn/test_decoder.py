from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from qsparse_export.config import ModelConfig, RopeScaling
from qsparse_export.nn.decoder import Decoder
from qsparse_export.nn.deploy import deploy

NAMES = [
    "llama",
    "dense",
    "qwen2",
    "window",
    "block-l2",
    "relu2",
    "bitnet",
    "bitnet-plain",
    "bitnet-linear-norm",
    "moe",
]


@pytest.mark.parametrize("name", [*NAMES, "bitnet-moe"])
@torch.no_grad()
def test_steps_with_a_cache_equal_the_whole_and_the_deployed_form(configs, tiny_decoder, name):
    decoder = tiny_decoder(configs[name])
    ids = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(0))
    whole, cache = decoder(ids)
    assert whole.shape == (2, 9, 96) and cache[1][0].shape == (2, 2, 9, 12)
    torch.testing.assert_close(deploy(decoder)(ids)[0], whole, rtol=1e-4, atol=1e-4)
    first, past = decoder(ids[:, :4])
    pieces = [first]
    for start, end in ((4, 5), (5, 8), (8, 9)):
        piece, past = decoder(ids[:, start:end], past=past)
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(past[0][1], cache[0][1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_left_padding_changes_nothing(configs, tiny_decoder, name):
    decoder = tiny_decoder(configs[name])
    ids = torch.tensor([[0, 0, 0, 5, 6, 7], [9, 8, 7, 6, 5, 4], [0, 0, 0, 0, 0, 0]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6, [0] * 6])
    logits, past = decoder(ids, mask)
    assert logits.isfinite().all(), "a row that is all padding must not become NaN"
    torch.testing.assert_close(logits[0, 3:], decoder(ids[:1, 3:])[0][0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[1], decoder(ids[1:2])[0][0], rtol=1e-4, atol=1e-4)
    step, _ = decoder(torch.tensor([[1], [2], [3]]), torch.cat((mask, torch.ones(3, 1)), 1), past=past)
    alone, _ = decoder(torch.tensor([[5, 6, 7, 1]]))
    torch.testing.assert_close(step[0, 0], alone[0, -1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_tokens_never_see_the_future(configs, tiny_decoder):
    decoder = tiny_decoder(configs["llama"])
    ids = torch.randint(0, 96, (1, 8))
    changed = ids.clone()
    changed[0, 5] += 1
    torch.testing.assert_close(decoder(ids)[0][0, :5], decoder(changed % 96)[0][0, :5])


@torch.no_grad()
def test_half_precision_runs_in_both_forms(configs, tiny_decoder):
    for name in ("llama", "relu2", "bitnet", "moe"):
        decoder = tiny_decoder(dataclasses.replace(configs[name], sparsity=())).half()
        ids = torch.randint(0, 96, (1, 8), generator=torch.Generator().manual_seed(0))
        wide = deploy(decoder).float()(ids)[0]
        for module in (decoder, deploy(decoder)):
            logits = module(ids)[0]
            assert logits.dtype == torch.float16
            assert (logits.float() - wide).norm() / wide.norm() < 5e-2


def test_masks_follow_the_rules_and_the_head_stays_dense(configs):
    decoder = Decoder(configs["llama"])
    linears: dict[str, Any] = dict(decoder.named_modules())
    assert linears["model.layers.1.self_attn.q_proj"].topk.sparse_ratio == 0.4
    assert linears["model.layers.1.mlp.down_proj"].topk.sparse_ratio == 0.5
    assert decoder.lm_head is not None and decoder.lm_head.topk.is_dense


def test_one_mask_is_shared_where_the_rules_agree(configs, tiny_decoder, monkeypatch):
    from qsparse_export.config import SparsityRule, TopK
    from qsparse_export.nn import masking

    calls: list[torch.Tensor] = []
    original = masking.topk_sparsify

    def counted(x, *rest):
        calls.append(x)
        return original(x, *rest)

    monkeypatch.setattr(masking, "topk_sparsify", counted)
    tiny_decoder(configs["bitnet"])(torch.tensor([[1, 2]]))
    assert len(calls) == 4 * 2  # q k v, o, gate and up, down; in two layers
    calls.clear()
    rules = (*configs["llama"].sparsity, SparsityRule("*.k_proj", TopK(0.1)))
    tiny_decoder(dataclasses.replace(configs["llama"], sparsity=rules))(torch.tensor([[1, 2]]))
    assert len(calls) == 6 * 2


def test_names_are_hugging_faces(configs):
    names = set(Decoder(configs["bitnet"]).state_dict())
    assert "lm_head.weight" not in names
    assert {
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.attn_sub_norm.weight",
        "model.layers.1.mlp.ffn_sub_norm.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.norm.weight",
    } <= names
    assert "lm_head.weight" in Decoder(configs["llama"]).state_dict()


# Against Hugging Face's own implementations ------------------------------------------------------------------------

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 130,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
ORACLES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {"rope_parameters": PLAIN}, {}),
    "llama3-rope": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {"rope_parameters": LLAMA3},
        {"rope_theta": 500.0, "rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 32)},
    ),
    "linear-rope": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}},
        {"rope_theta": 500.0, "rope_scaling": RopeScaling("linear", 4.0)},
    ),
    "mistral": (
        "MistralForCausalLM",
        "MistralConfig",
        {"rope_parameters": PLAIN, "sliding_window": 6},
        {"sliding_window": 6},
    ),
    "qwen2": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {"rope_parameters": PLAIN, "tie_word_embeddings": True},
        {"qkv_bias": True, "tied_embeddings": True},
    ),
    "bitnet-unquantised": (
        "BitNetForCausalLM",
        "BitNetConfig",
        {"rope_parameters": PLAIN, "tie_word_embeddings": True},
        {"activation": "relu2", "sub_norms": True, "tied_embeddings": True},
    ),
    "bitnet": (
        "BitNetForCausalLM",
        "BitNetConfig",
        {"rope_parameters": PLAIN, "tie_word_embeddings": True},
        {"activation": "relu2", "sub_norms": True, "tied_embeddings": True, "quantization": "bitnet"},
    ),
    "bitnet-linear-norm": (
        "BitNetForCausalLM",
        "BitNetConfig",
        {"rope_parameters": PLAIN, "tie_word_embeddings": True},
        {
            "activation": "relu2",
            "sub_norms": True,
            "tied_embeddings": True,
            "quantization": "bitnet",
            "linear_norm": True,
            "linear_norm_eps": 1e-4,
        },
    ),
}


def quantise_as_transformers_does(model: torch.nn.Module, *, linear_norm: bool) -> None:
    """AutoBitLinear, online: transformers' own fake quantisation of master weights."""
    from transformers.integrations.bitnet import AutoBitLinear

    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            linear = AutoBitLinear(
                module.in_features,
                module.out_features,
                bias=False,
                online_quant=True,
                use_rms_norm=linear_norm,
                rms_norm_eps=1e-4,
            )
            linear.weight = module.weight
            if linear.rms_norm is not None:
                torch.nn.init.uniform_(linear.rms_norm.weight, 0.5, 1.5)
            model.set_submodule(name, linear)


def eager_quantisers(monkeypatch) -> None:
    """The same functions without torch.compile, which would need a C++ compiler and half a minute."""
    from transformers.integrations import bitnet

    for quantiser in (bitnet.WeightQuant, bitnet.ActQuant):
        compiled = quantiser.forward
        monkeypatch.setattr(
            quantiser, "forward", staticmethod(getattr(compiled, "_torchdynamo_orig_callable", compiled))
        )


@pytest.mark.parametrize("name", ORACLES)
@torch.no_grad()
def test_logits_and_greedy_tokens_are_transformers(name, monkeypatch):
    transformers = pytest.importorskip("transformers")
    model_class, config_class, theirs, ours = ORACLES[name]
    torch.manual_seed(0)
    oracle = getattr(transformers, model_class)(getattr(transformers, config_class)(**SHAPE, **theirs)).eval()
    config = ModelConfig(
        architecture="bitnet" if "bitnet" in name else "llama",
        vocab_size=96,
        hidden_size=48,
        intermediate_size=130,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=12,
        **ours,
    )
    if config.quantization == "bitnet":
        eager_quantisers(monkeypatch)
        quantise_as_transformers_does(oracle.model, linear_norm=config.linear_norm)
    state = oracle.state_dict()
    if config.tied_embeddings:
        del state["lm_head.weight"]
    decoder = Decoder(config).eval()
    decoder.load_state_dict(state)

    ids = torch.randint(0, 96, (2, 17))
    for module in (decoder, deploy(decoder)):
        expected, got = oracle(ids).logits, module(ids)[0]
        assert (got - expected).norm() / expected.norm() < (1e-3 if config.quantization == "bitnet" else 1e-5)
        assert torch.equal(got.argmax(-1), expected.argmax(-1))

    logits, past = decoder(ids)
    text = ids
    for _ in range(12):
        token = logits[:, -1:].argmax(-1)
        text = torch.cat((text, token), 1)
        logits, past = decoder(token, past=past)
    for step in range(12):
        assert torch.equal(oracle(text[:, : 17 + step]).logits[:, -1].argmax(-1), text[:, 17 + step])
