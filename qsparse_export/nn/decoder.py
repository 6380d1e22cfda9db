"""The decoder: Llama, Mistral, Qwen2 and BitNet shapes, dense or mixture of experts, from one configuration.

Parameter names are Hugging Face's, so a state dict loads strictly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from qsparse_export.config import ModelConfig
from qsparse_export.nn.attention import Attention, Cache, attention_pattern
from qsparse_export.nn.linear import QSparseLinear
from qsparse_export.nn.mlp import FeedForward
from qsparse_export.nn.moe import MoEFeedForward
from qsparse_export.nn.norm import RMSNorm
from qsparse_export.nn.rotary import Rotary

INIT_STD = 0.02


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        name = f"model.layers.{index}"
        self.self_attn = Attention(config, f"{name}.self_attn")
        self.mlp = (
            MoEFeedForward(config, config.moe, f"{name}.mlp") if config.moe else FeedForward(config, f"{name}.mlp")
        )
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(
        self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], pattern: torch.Tensor, past: Cache
    ) -> tuple[torch.Tensor, Cache]:
        """x [B, S, hidden] to (x, cache); the other arguments as for :class:`Attention`."""
        attended, present = self.self_attn(self.input_layernorm(x), rotary, pattern, past)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), present


class Embedding(nn.Embedding):
    """Token embedding that can be the head too."""

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [B, S, hidden] to logits [B, S, vocab], reading the embedding where it lies."""
        # Flattened, torch.onnx makes Gemm(transB=1) of it; in three dimensions it would transpose the embedding, which
        # runtimes fold into a second copy.
        return nn.functional.linear(hidden.flatten(0, 1), self.weight).unflatten(0, hidden.shape[:2])


class DecoderBody(nn.Module):
    """Everything below the head: token ids to the last normalised hidden state."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.rotary = Rotary(config.head_dim, config.rope_theta, config.rope_scaling)
        self.sliding_window = config.sliding_window

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: Sequence[Cache],
    ) -> tuple[torch.Tensor, list[Cache]]:
        """See :meth:`Decoder.forward`; gives hidden states [B, S, hidden]."""
        x = self.embed_tokens(input_ids)
        rotary = self.rotary(position_ids, x.dtype)
        pattern = attention_pattern(attention_mask, input_ids.shape[1], self.sliding_window)
        present = []
        for layer, cache in zip(self.layers, past, strict=True):
            x, grown = layer(x, rotary, pattern, cache)
            present.append(grown)
        return self.norm(x), present


class Decoder(nn.Module):
    """A decoder-only language model, trainable; ``deploy()`` turns it into the form that is exported."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = DecoderBody(config)
        self.lm_head = None if config.tied_embeddings else QSparseLinear(config.hidden_size, config.vocab_size)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=INIT_STD)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past: Sequence[Cache] | None = None,
    ) -> tuple[torch.Tensor, list[Cache]]:
        """Logits and the grown cache.

        ``input_ids`` int64 [B, S]; ``attention_mask`` int64 or bool [B, P+S], 0 for padding (left padding gives each
        row the logits that it has alone); ``position_ids`` int64 [B, S]; ``past`` one (key, value) pair per layer, each
        [B, kv_heads, P, head_dim], P may be 0. What is left out is made up: no past, no padding, positions counted over
        the unpadded tokens. Returns logits [B, S, vocab] and pairs [B, kv_heads, P+S, head_dim].
        """
        batch, length = input_ids.shape
        if past is None:
            empty = self.model.norm.weight.new_empty(batch, self.config.kv_heads, 0, self.config.head_dim)
            past = [(empty, empty)] * self.config.layers
        if attention_mask is None:
            attention_mask = input_ids.new_ones(batch, past[0][0].shape[2] + length)
        if position_ids is None:
            position_ids = (attention_mask.to(torch.int64).cumsum(-1) - 1).clamp_min(0)[:, -length:]
        hidden, present = self.model(input_ids, attention_mask, position_ids, past)
        return self.head(hidden), present

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [B, S, hidden] to logits [B, S, vocab]; a tied head reads the embedding where it lies."""
        return self.model.embed_tokens.project(hidden) if self.lm_head is None else self.lm_head(hidden)
