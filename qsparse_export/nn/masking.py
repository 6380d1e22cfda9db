"""Top-k masks at the inputs of linears, computed once where several linears share an input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from qsparse_export.config import TopK
from qsparse_export.ops.topk_sparsify import topk_sparsify


class MaskedLinear(Protocol):
    """What training and deployed linears have in common."""

    @property
    def topk(self) -> TopK:
        """The mask at its input."""
        ...

    @property
    def rms_norm(self) -> torch.nn.Module | None:
        """A norm of its own before the mask."""
        ...

    def project(self, x: torch.Tensor, row_scale: torch.Tensor | None = None) -> torch.Tensor:
        """The product alone: x is masked already."""
        ...


def mask(x: torch.Tensor, topk: TopK) -> torch.Tensor:
    """x [..., K] with all but the top k of each row (or block) set to 0; x itself when the mask is dense."""
    if topk.is_dense:
        return x
    return topk_sparsify(x, topk.k(x.shape[-1]), topk.block, topk.rescale)


def masked_input(linear: MaskedLinear, x: torch.Tensor) -> torch.Tensor:
    """What ``linear.project`` takes: x after the linear's own norm, if it has one, and its mask."""
    return mask(x if linear.rms_norm is None else linear.rms_norm(x), linear.topk)


def shares_mask(linears: Sequence[MaskedLinear]) -> bool:
    """Whether the same x gives all of ``linears`` the same masked input."""
    return all(linear.rms_norm is None and linear.topk == linears[0].topk for linear in linears)


def masked_inputs(linears: Sequence[MaskedLinear], x: torch.Tensor) -> list[torch.Tensor]:
    """The masked input of each linear; one mask for all when they agree."""
    if shares_mask(linears):
        return [mask(x, linears[0].topk)] * len(linears)
    return [masked_input(linear, x) for linear in linears]
