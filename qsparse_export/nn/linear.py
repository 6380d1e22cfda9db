"""The two trainable linears: Q-Sparse in full precision, and BitNet's ternary one, both with straight-through gradients."""

from __future__ import annotations

import torch
from torch import nn

from qsparse_export.config import TopK
from qsparse_export.nn.masking import masked_input
from qsparse_export.nn.norm import RMSNorm
from qsparse_export.nn.quantizers import absmax_int8, absmean_ternary

DENSE = TopK()


def finished(
    y: torch.Tensor, bias: torch.Tensor | None, row_scale: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """A product y [..., N] times its ``row_scale`` float32 [..., 1], plus bias, rounded once to ``dtype``."""
    if row_scale is not None:
        y = y.to(torch.float32) * row_scale
    if bias is not None:
        y = y + bias
    return y.to(dtype)


class QSparseLinear(nn.Linear):
    """``Y = (X * M) W^T + b`` with ``M = TopK(abs(X))`` (Q-Sparse, arXiv 2407.10969v3, equation 1).

    Parameters are those of nn.Linear: ``weight`` [N, K], ``bias`` [N]. Gradients pass the mask as identity.
    """

    rms_norm: None = None

    def __init__(self, in_features: int, out_features: int, topk: TopK = DENSE, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.topk = topk

    def forward(self, x: torch.Tensor, row_scale: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] to [..., N]; ``row_scale`` float32 [..., 1] multiplies the product before the bias."""
        return self.project(masked_input(self, x), row_scale)

    def project(self, x: torch.Tensor, row_scale: torch.Tensor | None = None) -> torch.Tensor:
        """The product alone: x is masked already."""
        if row_scale is None:
            return nn.functional.linear(x, self.weight, self.bias)
        return finished(nn.functional.linear(x, self.weight), self.bias, row_scale, x.dtype)

    def extra_repr(self) -> str:
        """Shown by ``print(module)``."""
        return f"{super().extra_repr()}, {self.topk}"


class BitLinear(nn.Linear):
    """``Y = (Q(X) * M) Qw(W)^T * gamma/127 * alpha + b``: int8 activations, ternary weights (BitNet b1.58).

    ``weight`` [N, K] are floating-point master weights, quantised in every forward pass; the mask comes from the float
    abs(X). ``linear_norm_eps`` adds an RMSNorm before mask and quantiser (transformers' ``use_rms_norm``, parameter
    ``rms_norm.weight``). The forward value is that of the deployed ``TernaryMatMul`` exactly, the gradient that of the
    straight-through estimator: dL/dX and dL/dW as if neither mask nor rounding were there.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        topk: TopK = DENSE,
        bias: bool = False,
        linear_norm_eps: float | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.topk = topk
        self.rms_norm = None if linear_norm_eps is None else RMSNorm(in_features, linear_norm_eps)

    def forward(self, x: torch.Tensor, row_scale: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] to [..., N]; ``row_scale`` float32 [..., 1] multiplies the product before the bias."""
        return self.project(masked_input(self, x), row_scale)

    def project(self, x: torch.Tensor, row_scale: torch.Tensor | None = None) -> torch.Tensor:
        """The quantised product alone: x is masked already."""
        q, gamma = absmax_int8(x)
        w, alpha = absmean_ternary(self.weight)
        y = nn.functional.linear(q, w).to(torch.float32) * ((gamma / 127.0) * alpha)
        return finished(y.to(x.dtype), self.bias, row_scale, x.dtype)

    def extra_repr(self) -> str:
        """Shown by ``print(module)``."""
        return f"{super().extra_repr()}, {self.topk}"
