"""Where tensors come from: a lazy, named source, so that no more than one tensor is in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from qsparse_export.weight_formats import GroupFormat


@dataclass(frozen=True)
class TernaryWeight:
    """A weight matrix that is already ternary: ``values`` int8 [N, K] of -1, 0, 1; W is ``values * scale``."""

    values: torch.Tensor
    scale: float


@dataclass(frozen=True)
class GroupWeight:
    """A weight matrix of n-bit groups: W [N, K] is ``codes * scales``, each scale for ``format.group`` inputs of an output.

    ``scales`` float16 [N, groups]; ``codes()`` gives int8 [N, K], computed anew at each call: nothing so large is kept.
    """

    scales: torch.Tensor
    codes: Callable[[], torch.Tensor]
    format: GroupFormat


class WeightSource(Protocol):
    """Tensors by the names of the PyTorch module's parameters (Hugging Face names for decoders)."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name to logical shape (unpacked, [N, K] for linears) of every tensor; reads no tensor data."""
        ...

    def read(self, name: str) -> torch.Tensor | TernaryWeight | GroupWeight:
        """One tensor in its stored floating-point dtype, ternary or in groups; CheckpointError on NaN, Inf or damage."""
        ...


@dataclass(frozen=True)
class StateDict:
    """A WeightSource over tensors that are in memory (a trained module's ``state_dict()``)."""

    tensors: Mapping[str, torch.Tensor]

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name to shape."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        """The tensor itself, not a copy; CheckpointError when it holds NaN or Inf."""
        tensor = self.tensors[name]
        require_finite(name, tensor)
        return tensor


def require_finite(name: str, tensor: torch.Tensor) -> None:
    """Raises CheckpointError that names the tensor and counts its NaN and Inf values."""
    from qsparse_export.errors import CheckpointError

    if not tensor.is_floating_point() or not tensor.numel():
        return
    # One pass without a temporary: NaN and Inf both reach the extremes. isfinite().all() takes 40 times as long.
    if not all(math.isfinite(extreme) for extreme in tensor.detach().aminmax()):
        bad = int((~tensor.isfinite()).sum())
        raise CheckpointError(
            f"tensor {name} holds {bad} NaN or Inf values of {tensor.numel()}; "
            "a model with such weights computes nothing: repair the checkpoint (a diverged training step?)"
        )
