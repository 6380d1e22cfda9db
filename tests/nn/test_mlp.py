from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

from qsparse_export.config import SparsityRule, TopK
from qsparse_export.nn.deploy import deploy
from qsparse_export.nn.mlp import FeedForward

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"mlp_bias": True},
    "block": {"sparsity": (SparsityRule("*.down_proj", TopK(0.5, 32)),)},
    "l2": {"sparsity": (SparsityRule("*.down_proj", TopK(0.5, 0, "l2")),)},
    "sub-norm": {"sub_norms": True},
    "bitnet": {"quantization": "bitnet"},
    "bitnet-bias-l2": {
        "quantization": "bitnet",
        "mlp_bias": True,
        "sparsity": (SparsityRule("*.down_proj", TopK(0.5, 0, "l2")),),
    },
    "bitnet-sub-norm": {"quantization": "bitnet", "sub_norms": True},
    "bitnet-linear-norm": {"quantization": "bitnet", "linear_norm": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_squared_relu_survives_float16(configs, variant):
    """Gates and ups of some 70 make products of some 1e6; float16 ends at 65504, but the block's output fits."""
    torch.manual_seed(0)
    base = dataclasses.replace(configs["relu2"], mlp_bias=False, sparsity=(SparsityRule("*.down_proj", TopK(0.5)),))
    config = dataclasses.replace(base, **VARIANTS[variant])
    half = FeedForward(config, "model.layers.0.mlp").eval().half()
    half.gate_proj.weight.normal_(std=10)
    half.up_proj.weight.normal_(std=10)
    half.down_proj.weight.normal_(std=1e-3)
    x = torch.randn(6, config.hidden_size).half()
    naive = half.gate_proj(x).relu().square() * half.up_proj(x)
    assert naive.isinf().any(), "the naive form must overflow, or this test means nothing"
    expected = copy.deepcopy(half).float()(x.float())
    for module in (half, deploy(half)):
        y = module(x)
        assert y.dtype == torch.float16 and y.isfinite().all()
        assert (y.float() - expected).norm() / expected.norm() < 2e-2


@torch.no_grad()
def test_activations_by_hand(configs):
    for activation, act in (("silu", torch.nn.functional.silu), ("relu2", lambda t: t.relu() ** 2)):
        mlp = FeedForward(dataclasses.replace(configs["dense"], activation=activation), "model.layers.0.mlp")
        x = torch.randn(3, 48)
        product = act(x @ mlp.gate_proj.weight.t()) * (x @ mlp.up_proj.weight.t())
        torch.testing.assert_close(mlp(x), product @ mlp.down_proj.weight.t())


@torch.no_grad()
def test_a_row_of_zeros_and_a_row_of_nan(configs):
    mlp = FeedForward(configs["bitnet-plain"], "model.layers.0.mlp").half()
    x = torch.zeros(2, 48).half()
    x[1, 3] = torch.nan
    y = deploy(mlp)(x)
    assert y[0].eq(0).all() and y[1].isnan().all()
