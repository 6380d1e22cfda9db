"""What modules have in common whose scales belong to a format: a cast of the module leaves them as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Self

import torch
from torch import nn


class FixedBuffers(nn.Module):
    """Moves like any module, but ``half()`` and the like do not change the dtype of the buffers named in ``FIXED``."""

    FIXED: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        before = {name: self.get_buffer(name) for name in self.FIXED}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if self.get_buffer(name).dtype != buffer.dtype:
                setattr(self, name, buffer.to(self.get_buffer(name).device))
        return self
