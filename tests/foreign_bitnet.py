"""BitNet linears as transformers writes them, for export; needs transformers."""

import torch
from torch import nn
from transformers.integrations import bitnet

INPUTS, OUTPUTS = 128, 300  # 300 is no multiple of 128: the packed rows are padded
KINDS = ("packed", "offline", "online")


def linear(kind: str, seed: int = 0, dtype=torch.float32) -> nn.Module:
    """packed: uint8 weights unpacked in the graph, a dividing scale; offline: ternary floats; online: master weights."""
    torch.manual_seed(seed)
    ternary = torch.randint(-1, 2, (OUTPUTS, INPUTS)).to(dtype)
    if kind == "packed":
        module = bitnet.BitLinear(INPUTS, OUTPUTS, bias=False, dtype=dtype)
        module.weight = bitnet.pack_weights(ternary.clone())
        module.weight_scale = torch.tensor([17.3], dtype=dtype)
        return module
    module = bitnet.AutoBitLinear(INPUTS, OUTPUTS, bias=False, dtype=dtype, online_quant=kind == "online")
    if kind == "offline":
        module.weight.data = ternary
        module.weight_scale = torch.tensor([0.037], dtype=dtype)
    return module


class BitLinears(nn.Module):
    """The product of two linears on one input, which ``before`` may mask."""

    def __init__(self, kind, before=None, dtype=torch.float32):
        super().__init__()
        self.before = before
        self.a, self.b = linear(kind, 0, dtype), linear(kind, 1, dtype)

    def forward(self, x):
        h = self.before(x) if self.before else x
        return self.a(h) * torch.relu(self.b(h)) ** 2


def scale_of(weight):
    return weight.abs().mean().clamp(min=1e-5)


class StraightThroughLinear(nn.Linear):
    """The BitNet authors' training code: quantised values as sums x + (Q(x) - x).detach(), of activations and of weights."""

    def __init__(self, seed=0):
        super().__init__(INPUTS, OUTPUTS, bias=True)
        torch.manual_seed(seed)
        self.weight.data = torch.randn(OUTPUTS, INPUTS) * 0.137

    def forward(self, x):
        scale = 127.0 / x.abs().max(dim=-1, keepdim=True).values.clamp(min=1e-5)
        quantised = (x * scale).round().clamp(-128, 127) / scale
        w = self.weight
        alpha = 1.0 / scale_of(w)
        ternary = (w * alpha).round().clamp(-1, 1) / alpha
        return nn.functional.linear(x + (quantised - x).detach(), w + (ternary - w).detach(), self.bias)
