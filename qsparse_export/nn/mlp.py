"""The gated feed-forward block: SiLU or squared ReLU, the latter guarded against float16's range."""

from __future__ import annotations

import torch
from torch import nn

from qsparse_export.config import ModelConfig
from qsparse_export.nn.build import block_linear
from qsparse_export.nn.masking import masked_inputs
from qsparse_export.nn.norm import RMSNorm

SMALLEST_ROW_MAX = 1e-30
"""Floor of the row maximum that float16 products are divided by; far below anything that float16 can tell from 0."""


class FeedForward(nn.Module):
    """``down(act(gate(x)) * up(x))``; parameter names are Hugging Face's (``gate_proj``, ..., ``ffn_sub_norm``).

    Squared-ReLU GLU (Q-Sparse, BitNet 2B4T): ``relu(X W_gate^T)^2 * (X W_up^T)``. Its product overflows float16
    (max 65504) from gates of a few hundred, so it is computed in float32. Then either a norm brings it back, or each row
    is divided by its largest magnitude (top-k and the int8 quantiser ignore the scale of a row) and the result of
    ``down_proj`` is multiplied by it in float32.
    """

    def __init__(self, config: ModelConfig, name: str) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = block_linear(config, f"{name}.gate_proj", hidden, inner, bias)
        self.up_proj = block_linear(config, f"{name}.up_proj", hidden, inner, bias)
        self.down_proj = block_linear(config, f"{name}.down_proj", inner, hidden, bias)
        self.ffn_sub_norm = RMSNorm(inner, config.norm_eps) if config.sub_norms else None
        self.activation = config.activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., hidden] to [..., hidden]."""
        return self.of_masked(*masked_inputs((self.gate_proj, self.up_proj), x))

    def of_masked(self, gate_input: torch.Tensor, up_input: torch.Tensor) -> torch.Tensor:
        """The block on inputs that carry their masks already."""
        gate, up = self.gate_proj.project(gate_input), self.up_proj.project(up_input)
        if self.activation == "silu":
            product = nn.functional.silu(gate) * up
        else:
            product = nn.functional.relu(gate.to(torch.float32)).square() * up.to(torch.float32)
        if self.ffn_sub_norm is not None:
            return self.down_proj(self.ffn_sub_norm(product))
        if product.dtype == gate.dtype or self.down_proj.rms_norm is not None:
            return self.down_proj(product)
        if gate.dtype != torch.float16:  # bfloat16 has float32's range
            return self.down_proj(product.to(gate.dtype))
        row_max = product.abs().amax(-1, keepdim=True).clamp_min(SMALLEST_ROW_MAX)
        rescaled = self.down_proj.topk.rescale == "l2"  # then the scale of the row is gone in the original too
        return self.down_proj((product / row_max).to(gate.dtype), None if rescaled else row_max)
