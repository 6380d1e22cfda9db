"""The two deployed linears: weights channel-major, as the exported graph and the kernels read them; not for training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from qsparse_export.config import TopK
from qsparse_export.formats.ternary import row_bytes
from qsparse_export.nn.linear import finished
from qsparse_export.nn.masking import masked_input
from qsparse_export.nn.norm import RMSNorm
from qsparse_export.ops.ternary_matmul import ternary_matmul


class DenseLinear(nn.Module):
    """``Y = (X * M) weight_t + b`` with ``weight_t`` [K, N]: row k is one input channel, and ONNX needs no Transpose."""

    rms_norm: None = None

    def __init__(self, weight_t: torch.Tensor, bias: torch.Tensor | None, topk: TopK) -> None:
        super().__init__()
        self.weight_t = nn.Parameter(weight_t, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.topk = topk

    def forward(self, x: torch.Tensor, row_scale: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] to [..., N]; ``row_scale`` float32 [..., 1] multiplies the product before the bias."""
        return self.project(masked_input(self, x), row_scale)

    def project(self, x: torch.Tensor, row_scale: torch.Tensor | None = None) -> torch.Tensor:
        """The product alone: x is masked already."""
        return finished(x @ self.weight_t, self.bias, row_scale, x.dtype)


class TernaryLinear(nn.Module):
    """``Y = TernaryMatMul(X * M, packed, scale) + b``: 2-bit weights, uint8 [K, row_bytes(N)] (``formats.ternary``).

    ``scale`` is float32 [1] and stays so when the module is cast; ``rms_norm`` comes before the mask.
    """

    def __init__(
        self,
        packed: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        topk: TopK,
        outputs: int,
        rms_norm: RMSNorm | None = None,
    ) -> None:
        super().__init__()
        if packed.shape[1] != row_bytes(outputs):
            raise ValueError(f"rows of {packed.shape[1]} bytes; {outputs} outputs take {row_bytes(outputs)}")
        self.packed: torch.Tensor
        self.scale: torch.Tensor
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.topk = topk
        self.outputs = outputs
        self.rms_norm = rms_norm

    def forward(self, x: torch.Tensor, row_scale: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] to [..., N]; ``row_scale`` float32 [..., 1] multiplies the product before the bias."""
        return self.project(masked_input(self, x), row_scale)

    def project(self, x: torch.Tensor, row_scale: torch.Tensor | None = None) -> torch.Tensor:
        """The quantised product alone: x is masked already."""
        return finished(ternary_matmul(x, self.packed, self.scale, self.outputs), self.bias, row_scale, x.dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> TernaryLinear:
        """Moves like any module, but a cast (``half()``) leaves the scale in float32: the op asks for it."""
        scale = self.scale
        super()._apply(fn, recurse)
        if self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.scale.device)
        return self
