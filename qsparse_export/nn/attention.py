"""Causal attention with grouped KV heads, KV cache, rotary positions and an optional sliding window."""

from __future__ import annotations

import torch
from torch import nn

from qsparse_export.config import ModelConfig
from qsparse_export.nn.build import block_linear
from qsparse_export.nn.masking import masked_inputs
from qsparse_export.nn.norm import RMSNorm
from qsparse_export.nn.rotary import rotate

Cache = tuple[torch.Tensor, torch.Tensor]
"""Key and value, each [B, kv_heads, P, head_dim]; P may be 0."""


def attention_pattern(attention_mask: torch.Tensor, length: int, window: int | None) -> torch.Tensor:
    """bool [B, 1, S, P+S], True where a query may look: causal, not padding, within the window.

    ``attention_mask`` int64 or bool [B, P+S], 0 for padding; ``length`` is S, the newest slots. Every query may look at
    itself even if it is padding: a row with nothing to look at would be NaN.
    """
    total = attention_mask.shape[1]
    slots = torch.arange(total, device=attention_mask.device)
    query = (torch.arange(length, device=attention_mask.device) + (total - length)).unsqueeze(-1)
    visible = slots <= query
    if window is not None:
        visible = visible & (slots > query - window)
    return (visible & attention_mask.to(torch.bool).unsqueeze(1).unsqueeze(1)) | (slots == query)


class Attention(nn.Module):
    """Attention of one decoder layer; parameter names are Hugging Face's (``q_proj`` ... ``attn_sub_norm``)."""

    def __init__(self, config: ModelConfig, name: str) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
        hidden = config.hidden_size
        self.q_proj = block_linear(config, f"{name}.q_proj", hidden, width, config.qkv_bias)
        self.k_proj = block_linear(config, f"{name}.k_proj", hidden, kv_width, config.qkv_bias)
        self.v_proj = block_linear(config, f"{name}.v_proj", hidden, kv_width, config.qkv_bias)
        self.o_proj = block_linear(config, f"{name}.o_proj", width, hidden, config.o_bias)
        self.attn_sub_norm = RMSNorm(width, config.norm_eps) if config.sub_norms else None

    def forward(
        self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], pattern: torch.Tensor, past: Cache
    ) -> tuple[torch.Tensor, Cache]:
        """x [B, S, hidden], rotary cos and sin [B, S, head_dim / 2], pattern bool [B, 1, S, P+S] to (y, cache)."""
        linears = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (linear.project(h) for linear, h in zip(linears, masked_inputs(linears, x), strict=True))
        query, key = rotate(query, *rotary, self.heads), rotate(key, *rotary, self.kv_heads)
        attend = self._onnx_attention if torch.compiler.is_exporting() else self._torch_attention
        y, cache = attend(query, key, value, pattern, past)
        return self.o_proj(y if self.attn_sub_norm is None else self.attn_sub_norm(y)), cache

    def _onnx_attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: torch.Tensor, past: Cache
    ) -> tuple[torch.Tensor, Cache]:
        """One ONNX Attention node that also grows the cache."""
        y, present_key, present_value, _ = torch.onnx.ops.attention(
            query, key, value, pattern, *past, q_num_heads=self.heads, kv_num_heads=self.kv_heads
        )
        return y, (present_key, present_value)

    def _torch_attention(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pattern: torch.Tensor, past: Cache
    ) -> tuple[torch.Tensor, Cache]:
        def by_head(t: torch.Tensor) -> torch.Tensor:
            return t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        present = (torch.cat((past[0], by_head(key)), dim=2), torch.cat((past[1], by_head(value)), dim=2))
        y = nn.functional.scaled_dot_product_attention(
            by_head(query), *present, attn_mask=pattern, enable_gqa=self.heads != self.kv_heads
        )
        return y.transpose(1, 2).flatten(2), present
