"""Dequantised matrices that are kept between calls: a verification runs the same model some ten times."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch


@dataclass
class _Kept:
    """By address and shape of the packed matrix, which is kept along so that nothing else gets its address."""

    room: int
    matrices: dict[tuple[int, torch.Size], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


_kept: ContextVar[_Kept | None] = ContextVar("kept_matrices", default=None)


@contextmanager
def keep_dequantized(room: int) -> Iterator[None]:
    """Within it, the n-bit ops dequantise a matrix once, as long as all of these take at most ``room`` bytes.

    Packed weights must not change meanwhile. What comes first stays: a model is read in the same order each time.
    """
    token = _kept.set(_Kept(room))
    try:
        yield
    finally:
        _kept.reset(token)


def dequantized_once(packed: torch.Tensor, dequantize: Callable[[], torch.Tensor]) -> torch.Tensor:
    """``dequantize()``, or what it gave for ``packed`` before. The caller must not change the result."""
    kept = _kept.get()
    if kept is None:
        return dequantize()
    key = packed.data_ptr(), packed.shape
    if key in kept.matrices:
        return kept.matrices[key][1]
    made = dequantize()
    if made.nbytes <= kept.room:
        kept.room -= made.nbytes
        kept.matrices[key] = packed, made
    return made
