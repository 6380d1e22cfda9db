"""Tiny configurations and decoders that several tests use."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from qsparse_export.config import ModelConfig, MoE, SparsityRule, TopK
from qsparse_export.nn.decoder import Decoder

SPARSE = (SparsityRule("*", TopK(0.4)), SparsityRule("*.down_proj", TopK(0.5)))
TINY = ModelConfig(
    architecture="llama",
    vocab_size=96,
    hidden_size=48,
    intermediate_size=130,  # not a multiple of 4, 32 or 64
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=12,
    sparsity=SPARSE,
)
_R = dataclasses.replace
CONFIGS = {
    "llama": TINY,
    "dense": _R(TINY, sparsity=()),
    "qwen2": _R(TINY, architecture="qwen2", qkv_bias=True, tied_embeddings=True),
    "window": _R(TINY, architecture="mistral", sliding_window=4),
    "block-l2": _R(TINY, sparsity=(SparsityRule("*", TopK(0.5, 32, "l2")),)),
    "relu2": _R(TINY, activation="relu2", mlp_bias=True, o_bias=True),
    "bitnet": _R(
        TINY,
        architecture="bitnet",
        quantization="bitnet",
        activation="relu2",
        sub_norms=True,
        tied_embeddings=True,
    ),
    "bitnet-plain": _R(TINY, quantization="bitnet", activation="relu2"),
    "bitnet-linear-norm": _R(TINY, quantization="bitnet", activation="relu2", linear_norm=True, linear_norm_eps=1e-5),
    "moe": _R(TINY, moe=MoE(experts=4, experts_per_token=2)),
    "bitnet-moe": _R(TINY, quantization="bitnet", moe=MoE(experts=3, experts_per_token=1, normalize=False)),
}


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tensors this small only lose by being split."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers in every run, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def configs() -> dict[str, ModelConfig]:
    return CONFIGS


@pytest.fixture(scope="session")
def tiny_decoder():
    """Makes a decoder with weights large enough for its layers to matter."""

    def make(config: ModelConfig, seed: int = 0) -> Decoder:
        torch.manual_seed(seed)
        decoder = Decoder(config)
        with torch.no_grad():
            for name, parameter in decoder.named_parameters():
                if parameter.dim() == 2:
                    parameter.mul_(5)
                if name.endswith(".bias"):
                    parameter.normal_(std=0.1)
        return decoder.eval()

    return make
