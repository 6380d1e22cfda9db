"""PyTorch with the activations of n-bit products moved by as much as native kernels may round them to 16 bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

LARGEST_STEP = 1 / 65534  # of the largest of a block: half of a step of 1/32767 (docs/adr/sixteen-bit-activations.md)
_HEAD_BLOCK = {4: 64, 8: 32}
"""Bits -> inputs of DenseMatMulNBits that are rounded together."""


class ActivationNoise(TorchDispatchMode):
    """While active, each activation of an n-bit product is off by up to 1/65534 of the largest of its block, at random."""

    def __init__(self, random: torch.Generator) -> None:
        super().__init__()
        self._random = random

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Moves the first operand of the two products; everything else runs as it is."""
        if func is torch.ops.qsparse.matmul_nbits.default:
            x, *rest, group = args
            return func(self._moved(x, group), *rest, group)
        if func is torch.ops.qsparse.dense_matmul_nbits.default:
            x, w, scales, n, bits, group = args
            return func(self._moved(x, _HEAD_BLOCK[bits]), w, scales, n, bits, group)
        return func(*args, **(kwargs or {}))

    def _moved(self, x: torch.Tensor, block: int) -> torch.Tensor:
        k = x.shape[-1]
        blocks = torch.nn.functional.pad(x.float(), (0, -k % block)).unflatten(-1, (-1, block))
        directions = torch.rand(blocks.shape, generator=self._random) * 2 - 1
        step = blocks.abs().amax(-1, keepdim=True) * LARGEST_STEP
        moved = blocks + torch.where(blocks == 0, 0, directions * step)  # what is 0 stays 0: it is skipped
        return moved.flatten(-2)[..., :k].to(x.dtype)
