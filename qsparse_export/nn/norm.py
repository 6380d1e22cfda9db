"""RMS normalisation, computed in float32 whatever the model's type."""

from __future__ import annotations

import torch
from torch import nn


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension (arXiv 1910.07467).

    Takes x [..., dim] in the weight's dtype or float32 (a product too large for float16); gives the weight's dtype.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., dim] to the same shape."""
        y = nn.functional.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)
        return y.to(self.weight.dtype)

    def extra_repr(self) -> str:
        """Shown by ``print(module)``."""
        return f"{self.weight.shape[0]}, eps={self.eps}"
