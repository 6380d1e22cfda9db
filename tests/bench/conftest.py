"""Bundles of tiny random decoders."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

import qsparse_export as qs
from qsparse_export.config import ModelConfig, MoE, SparsityRule, TopK
from qsparse_export.nn.decoder import Decoder
from qsparse_export.passes.pipelines import CLEAN, LOWER

sys.path.append(str(Path(__file__).parent))

TINY = ModelConfig(
    architecture="llama",
    vocab_size=96,
    hidden_size=48,
    intermediate_size=130,  # not a multiple of 4, 32 or 64
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=12,
    max_positions=40,
    activation="relu2",  # zeros of its own before down_proj
    sparsity=(SparsityRule("*", TopK(0.4)), SparsityRule("*.down_proj", TopK(0.8))),
)
_BITNET = dataclasses.replace(
    TINY,
    architecture="bitnet",
    quantization="bitnet",
    tied_embeddings=True,
    sparsity=(SparsityRule("*", TopK(0.5)), SparsityRule("*.down_proj", TopK())),
)
_MOE = MoE(experts=3, experts_per_token=1)
CONFIGS = {
    "float": TINY,
    "float-dense": dataclasses.replace(TINY, sparsity=()),
    "bitnet": _BITNET,
    "bitnet-dense": dataclasses.replace(_BITNET, sparsity=()),
    "bitnet-block": dataclasses.replace(_BITNET, sparsity=(SparsityRule("*", TopK(0.5, block=32, rescale="l2")),)),
    "bitnet-block-dense": dataclasses.replace(_BITNET, sparsity=(SparsityRule("*", TopK(0.0, rescale="l2")),)),
    "moe": dataclasses.replace(_BITNET, moe=_MOE),
    "float-moe": dataclasses.replace(TINY, moe=_MOE),
    "portable": TINY,
    "unfused": TINY,
}
UNFUSED = ",".join(CLEAN + LOWER)


@pytest.fixture(scope="session")
def bundles(tmp_path_factory):
    """Name in ``CONFIGS`` to its bundle; models of the same architecture have the same weights."""
    made = {}

    def make(name):
        if name not in made:
            torch.manual_seed(0)
            out = tmp_path_factory.mktemp(name) / "bundle"
            made[name] = qs.export(
                Decoder(CONFIGS[name]),
                out=out,
                name=name,
                verify="none",
                portable=name == "portable",
                pipeline=UNFUSED if name == "unfused" else None,
            )
        return made[name]

    return make


@pytest.fixture(scope="session")
def device_bundle(tmp_path_factory):
    """The bitnet, verified, with the program that measures it on a device."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("device") / "bundle"
    return qs.export(Decoder(CONFIGS["bitnet"]), out=folder, name="bitnet", with_bench=True).path
