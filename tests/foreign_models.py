"""Models as other people export them: the spellings of a top-k mask and of a BitNet linear, through both exporters of PyTorch."""

import io
import logging
import warnings

import onnx
import torch
from torch import nn

WIDTH = 64
KEPT = 38  # int((1 - 0.4) * 64)


def official(x, ratio=0.4):
    """As the official Q-Sparse code does it: in float32, in place, and straight through."""
    k = int((1 - ratio) * x.shape[-1])
    wide = x.float()
    indices = torch.topk(wide.abs(), k, dim=-1).indices
    mask = torch.zeros_like(wide, dtype=torch.bool)
    mask.scatter_(dim=-1, index=indices, src=torch.ones_like(indices, dtype=torch.bool))
    wide *= mask
    sparse = wide.type(x.dtype)
    return (sparse - x).detach() + x


def copied(x):
    """The official code where x.float() makes a copy, as it does in half precision."""
    mask = torch.zeros_like(x, dtype=torch.bool).scatter(-1, indices(x), torch.ones_like(indices(x), dtype=torch.bool))
    return (x * mask - x).detach() + x


def indices(x, **options):
    return x.abs().topk(KEPT, dim=-1, **options).indices


def ones(x):
    return x * torch.zeros_like(x).scatter(-1, indices(x), 1.0)


def values(x):
    chosen = indices(x, sorted=False)
    return torch.zeros_like(x).scatter(-1, chosen, x.gather(-1, chosen))


def where(x):
    return torch.where(torch.zeros_like(x, dtype=torch.bool).scatter(-1, indices(x), True), x, torch.zeros_like(x))


def filled(x):
    return x.masked_fill(~torch.zeros_like(x, dtype=torch.bool).scatter(-1, indices(x), True), 0.0)


def complement(x):
    return x * (1 - torch.ones_like(x).scatter(-1, indices(x), 0.0))


def one_hot(x):
    return x * nn.functional.one_hot(indices(x), x.shape[-1]).sum(-2).to(x.dtype)


def from_shape(x):
    mask = torch.zeros(x.shape, dtype=x.dtype)
    mask.scatter_(-1, torch.topk(torch.abs(x), KEPT)[1], 1)
    return mask * x


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mask):
        return x * mask

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def autograd_function(x):
    return StraightThrough.apply(x, torch.zeros_like(x).scatter(-1, indices(x), 1.0))


def sum_before(x):
    return x + (ones(x) - x).detach()


def in_float32(x):
    return ones(x.float()).to(x.dtype)


def blocks(x):
    rows = x.reshape(*x.shape[:-1], -1, 32)
    chosen = rows.abs().topk(16, dim=-1).indices
    return (rows * torch.zeros_like(rows).scatter(-1, chosen, 1.0)).reshape(x.shape)


def normalised(x):
    return nn.functional.normalize(ones(x), dim=-1, eps=1e-12)


def masked_twice(x):
    return ones(ones(x))


SPELLINGS = {
    function.__name__: function
    for function in (
        official, copied, ones, values, where, filled, complement, one_hot, from_shape, autograd_function, sum_before,
        in_float32, masked_twice,
    )
}  # fmt: skip
"""Whole-row masks: TopKSparsify<k=38, block=0, rescale=none>."""


class Masked(nn.Module):
    """A mask on something that the model computed, and a product."""

    def __init__(self, function, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.linear = nn.Linear(WIDTH, 8, bias=False, dtype=dtype)

    def forward(self, x):
        return self.linear(self.function(x * 0.5))


class QSparseMLP(nn.Module):
    """Two gated blocks whose inputs are masked as in the official code."""

    def __init__(self, function=official):
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.blocks = nn.ModuleList(
            nn.ModuleDict({
                "gate": nn.Linear(WIDTH, 200, bias=False),
                "up": nn.Linear(WIDTH, 200, bias=False),
                "down": nn.Linear(200, WIDTH, bias=False),
            })
            for _ in range(2)
        )  # fmt: skip

    def forward(self, x):
        for block in self.blocks:
            h = self.function(x)
            h = nn.functional.silu(block["gate"](h)) * block["up"](h)
            x = x + block["down"](self.function(h))
        return x


def export(module, opset=23, dynamo=True, width=WIDTH, dtype=torch.float32, args=None):
    """``module`` of x [batch, sequence, width] (or of ``args``) through torch.onnx, both dynamic."""
    args = args or (torch.randn(2, 3, width, dtype=dtype),)
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            warnings.simplefilter("ignore")
            if dynamo:
                dims = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
                program = torch.onnx.export(
                    module.eval(),
                    args,
                    dynamo=True,
                    opset_version=opset,
                    verbose=False,
                    dynamic_shapes=(dims,) * len(args),
                )
                return program.model_proto
            file = io.BytesIO()
            axes = {"x": {0: "batch", 1: "sequence"}}
            torch.onnx.export(
                module.eval(), args, file, dynamo=False, opset_version=opset, input_names=["x"], output_names=["y"],
                dynamic_axes=axes,
            )  # fmt: skip
            return onnx.load_from_string(file.getvalue())
    finally:
        logger.setLevel(level)
