"""The deployed linears: weights channel-major, as the exported graph and the kernels read them; not for training."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from qsparse_export.config import TopK
from qsparse_export.formats import nbits
from qsparse_export.formats.ternary import row_bytes
from qsparse_export.nn.fixed_buffers import FixedBuffers
from qsparse_export.nn.linear import finished
from qsparse_export.nn.masking import masked_input
from qsparse_export.nn.norm import RMSNorm
from qsparse_export.ops.sparse_matmul_nbits import matmul_nbits
from qsparse_export.ops.ternary_matmul import ternary_matmul
from qsparse_export.weight_formats import GroupFormat


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


class TernaryLinear(FixedBuffers):
    """``Y = TernaryMatMul(X * M, packed, scale) + b``: 2-bit weights, uint8 [K, row_bytes(N)] (``formats.ternary``).

    ``scale`` is float32 [1] and stays so when the module is cast; ``rms_norm`` comes before the mask.
    """

    FIXED: ClassVar[tuple[str, ...]] = ("scale",)

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


class NBitsLinear(FixedBuffers):
    """``Y = (X * M) dequantize(packed, scales) + b``: 4- or 8-bit groups, channel-major (``formats.nbits``).

    ``packed`` uint8 [K, columns(N) * bits / 8]; ``scales`` float16 [groups, columns(N)], and they stay so when the module is
    cast.
    """

    FIXED: ClassVar[tuple[str, ...]] = ("scales",)

    rms_norm: None = None

    def __init__(
        self,
        packed: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
        topk: TopK,
        outputs: int,
        chosen: GroupFormat,
    ) -> None:
        super().__init__()
        expected = (nbits.group_count(packed.shape[0], chosen.group), nbits.columns(outputs))
        if packed.shape[1] * 8 != nbits.columns(outputs) * chosen.bits or tuple(scales.shape) != expected:
            raise ValueError(
                f"packed {list(packed.shape)} and scales {list(scales.shape)} are not {outputs} outputs of {chosen}"
            )
        self.packed: torch.Tensor
        self.scales: torch.Tensor
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.topk = topk
        self.outputs = outputs
        self.format = chosen

    def forward(self, x: torch.Tensor, row_scale: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] to [..., N]; ``row_scale`` float32 [..., 1] multiplies the product before the bias."""
        return self.project(masked_input(self, x), row_scale)

    def project(self, x: torch.Tensor, row_scale: torch.Tensor | None = None) -> torch.Tensor:
        """The product alone: x is masked already."""
        y = matmul_nbits(x, self.packed, self.scales, self.outputs, self.format.bits, self.format.group)
        return finished(y, self.bias, row_scale, x.dtype)
