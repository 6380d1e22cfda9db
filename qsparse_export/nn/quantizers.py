"""BitNet's two quantisers with straight-through gradients: absmax int8 activations, absmean ternary weights.

Source: BitNet b1.58 (arXiv 2402.17764) and its training tips. Values come as integers in float32 beside their scale, not
as rescaled floats, so that a product of the two is the exact integer sum that ``TernaryMatMul`` computes.
"""

from __future__ import annotations

import torch

from qsparse_export.ops.ternary_matmul import GAMMA_FLOOR

ALPHA_FLOOR = 1e-5


def straight_through(x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """``value`` exactly (x must be finite), with the gradient of ``x``: dL/dx = dL/dvalue."""
    if torch.compiler.is_exporting():
        return value
    return value.detach() + (x - x.detach())  # x - x is exactly 0, unlike the usual x + (value - x)


def absmax_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., K] to (q, gamma): q float32 [..., K] of integers -128..127, gamma float32 [..., 1] = max(abs(x)) per row.

    ``q = clip(round(127 / gamma * x))``, half to even, gamma floored at 1e-5; x is about ``q * gamma / 127``.
    Straight-through: gamma counts as a constant and rounding as the identity.
    """
    wide = x.to(torch.float32)
    gamma = wide.detach().abs().amax(-1, keepdim=True).clamp_min(GAMMA_FLOOR)
    scaled = (torch.full_like(gamma, 127.0) / gamma) * wide
    return straight_through(scaled, scaled.round().clamp(-128, 127)), gamma


def absmean_scale(weight: torch.Tensor) -> torch.Tensor:
    """float32 scalar alpha = mean(abs(W)) over the whole matrix, floored at 1e-5."""
    return weight.detach().to(torch.float32).abs().mean().clamp_min(ALPHA_FLOOR)


@torch.no_grad()
def ternary_values(weight: torch.Tensor) -> torch.Tensor:
    """W [N, K] to int8 [N, K] = clip(round(W / alpha), -1, 1): the values of :func:`absmean_ternary`, for packing."""
    wide = weight.to(torch.float32, copy=True)
    return wide.div_(absmean_scale(weight)).round_().clamp_(-1, 1).to(torch.int8)


def absmean_ternary(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """W [N, K] to (w, alpha): w float32 [N, K] = clip(round(W / alpha), -1, 1), alpha float32 scalar = mean(abs(W)).

    Straight-through: alpha counts as a constant and rounding as the identity.
    """
    alpha = absmean_scale(weight)
    scaled = weight.to(torch.float32) / alpha
    return straight_through(scaled, scaled.round().clamp(-1, 1)), alpha
