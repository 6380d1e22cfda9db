"""Mixture of experts: each token is fed to the few experts that its router prefers."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from qsparse_export.config import ModelConfig, MoE
from qsparse_export.nn.linear import QSparseLinear
from qsparse_export.nn.masking import mask, shares_mask
from qsparse_export.nn.mlp import FeedForward


class MoEFeedForward(nn.Module):
    """Token-choice routing as in Mixtral (arXiv 2401.04088) and Qwen2-MoE: softmax over all experts, then the top k.

    ``gate`` [experts, hidden] is the router, always dense and unquantised; ``experts.{e}`` are Q-Sparse feed-forward
    blocks. ``normalize`` divides the weights of the chosen experts by their sum. An expert computes only the tokens that
    chose it, in the exported graph too (NonZero and Gather per expert).
    """

    def __init__(self, config: ModelConfig, moe: MoE, name: str) -> None:
        super().__init__()
        self.gate = QSparseLinear(config.hidden_size, moe.experts)
        self.experts = nn.ModuleList(FeedForward(config, f"{name}.experts.{e}") for e in range(moe.experts))
        self.moe = moe

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., hidden] to [..., hidden]."""
        tokens = x.reshape(-1, x.shape[-1])
        chances = self.gate(tokens).to(torch.float32).softmax(-1)
        best, chosen = chances.topk(self.moe.experts_per_token, dim=-1)
        if self.moe.normalize:
            best = best / best.sum(-1, keepdim=True)
        weights = torch.zeros_like(chances).scatter(-1, chosen, best)  # [tokens, experts], 0 where not chosen
        experts = [cast(FeedForward, expert) for expert in self.experts]
        linears = [linear for expert in experts for linear in (expert.gate_proj, expert.up_proj)]
        shared = shares_mask(linears)
        inputs = mask(tokens, linears[0].topk) if shared else tokens
        y = torch.zeros_like(tokens, dtype=torch.float32)  # ORT's CPU ScatterElements and ScatterND add no float16
        for expert, weight in zip(experts, weights.unbind(-1), strict=True):
            rows = weight.nonzero().squeeze(-1)
            h = inputs.index_select(0, rows)
            out = expert.of_masked(h, h) if shared else expert(h)
            out = out.to(torch.float32) * weight.index_select(0, rows).unsqueeze(-1)
            y = y.scatter_add(0, rows.unsqueeze(-1).expand_as(out), out)
        return y.to(x.dtype).reshape(x.shape)
