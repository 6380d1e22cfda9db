"""Rotary position embedding, half-split as in Hugging Face's models, with linear and Llama 3 frequency scaling."""

from __future__ import annotations

import math

import torch
from torch import nn

from qsparse_export.config import RopeScaling


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> tuple[float, ...]:
    """Angle per position of each of the head_dim / 2 pairs: ``theta^(-2i / head_dim)``, scaled.

    Sources: RoFormer (arXiv 2104.09864); ``linear`` divides by the factor (position interpolation, arXiv 2306.15595);
    ``llama3`` divides long wavelengths, keeps short ones and blends between (Llama 3.1 model card and code).
    """
    plain = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    if scaling is None:
        return tuple(plain)
    if scaling.kind == "linear":
        return tuple(f / scaling.factor for f in plain)
    return tuple(_llama3(f, scaling) for f in plain)


def _llama3(frequency: float, scaling: RopeScaling) -> float:
    turns = scaling.original_max_positions * frequency / (2 * math.pi)  # in the original context
    if turns > scaling.high_freq_factor:
        return frequency
    if turns < scaling.low_freq_factor:
        return frequency / scaling.factor
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return (1 - blend) * frequency / scaling.factor + blend * frequency


class Rotary(nn.Module):
    """Cosines and sines of the positions, once for all layers; no parameters, no limit on the positions."""

    def __init__(self, head_dim: int, theta: float, scaling: RopeScaling | None) -> None:
        super().__init__()
        # Numbers and not a tensor: they survive construction on the meta device or under a fake tensor mode.
        self.frequencies = frequencies(head_dim, theta, scaling)

    def forward(self, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """position_ids int64 [B, S] to (cos, sin), each ``dtype`` [B, S, head_dim / 2], computed in float32."""
        frequency = torch.tensor(self.frequencies, dtype=torch.float32, device="cpu").to(position_ids.device)
        angle = position_ids.to(torch.float32).unsqueeze(-1) * frequency
        return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int) -> torch.Tensor:
    """x [B, S, heads * head_dim] turned by cos, sin [B, S, head_dim / 2]; ONNX RotaryEmbedding when exporting."""
    if torch.compiler.is_exporting():
        return torch.onnx.ops.rotary_embedding(x, cos, sin, num_heads=heads)
    first, second = x.unflatten(-1, (heads, -1)).chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return torch.cat((cos * first - sin * second, sin * first + cos * second), dim=-1).flatten(2)
