from __future__ import annotations

from typing import Any

import pytest
import torch

from qsparse_export.config import MoE
from qsparse_export.nn.deploy import deploy
from qsparse_export.nn.moe import MoEFeedForward


def naive(moe: MoEFeedForward, x: torch.Tensor) -> torch.Tensor:
    """Token by token, expert by expert."""
    out = torch.zeros_like(x)
    for token, y in zip(x, out, strict=True):
        chances = (moe.gate.weight @ token).softmax(-1)
        chosen = sorted(range(len(chances)), key=lambda e: -float(chances[e]))[: moe.moe.experts_per_token]
        total = sum(chances[e] for e in chosen) if moe.moe.normalize else 1.0
        for e in chosen:
            y += chances[e] / total * moe.experts[e](token[None])[0]
    return out


@pytest.mark.parametrize("name", ["moe", "bitnet-moe"])
@pytest.mark.parametrize("shape", [MoE(4, 2), MoE(4, 1, normalize=False), MoE(3, 3), MoE(8, 2)])
@torch.no_grad()
def test_equals_the_naive_loop(configs, name, shape):
    torch.manual_seed(1)
    moe = MoEFeedForward(configs[name], shape, "model.layers.0.mlp")
    moe.gate.weight.normal_()
    x = torch.randn(5, 48)
    expected = naive(moe, x)
    torch.testing.assert_close(moe(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moe(x[None]), expected[None], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(deploy(moe)(x), expected, rtol=1e-5, atol=1e-5)
    assert moe(x[:0]).shape == (0, 48)


def test_experts_mask_like_the_configuration_says(configs):
    moe: Any = MoEFeedForward(configs["moe"], MoE(2, 1), "model.layers.0.mlp")
    assert moe.gate.topk.is_dense
    assert moe.experts[1].up_proj.topk.sparse_ratio == 0.4
    assert moe.experts[1].down_proj.topk.sparse_ratio == 0.5
    assert "experts.1.down_proj.weight" in moe.state_dict() and "gate.weight" in moe.state_dict()


def test_router_learns(configs):
    moe = MoEFeedForward(configs["moe"], MoE(4, 2), "model.layers.0.mlp")
    moe(torch.randn(5, 48)).square().sum().backward()
    assert moe.gate.weight.grad is not None and moe.gate.weight.grad.abs().sum() > 0
