"""A PyTorch decoder behind the interface of a runtime session, so that one generation loop serves both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from qsparse_export.runtimes.base import NativeCalls


class TorchSession:
    """Runs ``module(input_ids, attention_mask, position_ids, past)`` eagerly, without gradients; its cache grows."""

    shares_cache = False

    def __init__(self, module: torch.nn.Module, layers: int) -> None:
        self._module = module.eval()
        self._layers = layers
        cache = [f"{i}.{part}" for i in range(layers) for part in ("key", "value")]
        self.input_names = ("input_ids", "attention_mask", "position_ids", *(f"past_key_values.{c}" for c in cache))
        self.output_names = ("logits", *(f"present.{c}" for c in cache))

    @torch.no_grad()
    def run(self, feeds: Mapping[str, Any], results: Mapping[str, Any] | None = None) -> dict[str, torch.Tensor]:
        """See :class:`qsparse_export.runtimes.base.Session`."""
        assert not results, "no cache is shared here"
        tensors = {n: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for n, v in feeds.items()}
        past = [
            (tensors[f"past_key_values.{i}.key"], tensors[f"past_key_values.{i}.value"]) for i in range(self._layers)
        ]
        logits, present = self._module(tensors["input_ids"], tensors["attention_mask"], tensors["position_ids"], past)
        return dict(zip(self.output_names, (logits, *(t for pair in present for t in pair)), strict=True))

    def to_tensor(self, array: np.ndarray) -> torch.Tensor:
        """See :class:`qsparse_export.runtimes.base.Session`."""
        return torch.from_numpy(array)

    def to_numpy(self, tensor: torch.Tensor) -> np.ndarray:
        """See :class:`qsparse_export.runtimes.base.Session`."""
        return tensor.numpy()

    def native_calls(self) -> NativeCalls:
        """PyTorch runs no kernel of ours."""
        return {}
