"""Where tensors come from: a lazy, named source, so that no more than one tensor is in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TernaryWeight:
    """A weight matrix that is already ternary: ``values`` int8 [N, K] of -1, 0, 1; W is ``values * scale``."""

    values: torch.Tensor
    scale: float


class WeightSource(Protocol):
    """Tensors by the names of the PyTorch module's parameters (Hugging Face names for decoders)."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name to logical shape (unpacked, [N, K] for linears) of every tensor; reads no tensor data."""
        ...

    def read(self, name: str) -> torch.Tensor | TernaryWeight:
        """One tensor in its stored floating-point dtype, or ternary; CheckpointError on NaN, Inf or damaged data."""
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
