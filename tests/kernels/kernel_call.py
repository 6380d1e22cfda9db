"""A call of one op's C function, in the one form that all ops have:

int FUNCTION(const qsk_variant*, const FUNCTION_args*, const qsk_parallel*, void* scratch, int64_t scratch_bytes)
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

ELEMENT_TYPES = {np.dtype(np.float32): 1, np.dtype(np.float16): 2}
"""QSK_FLOAT32 and QSK_FLOAT16 of qsk/status.h."""


@dataclass
class Call:
    """``args`` is the op's argument struct; its pointers are set from ``inputs`` and ``outputs``, by field name."""

    function: str
    args: ctypes.Structure
    inputs: dict[str, np.ndarray] = field(default_factory=dict)
    outputs: dict[str, np.ndarray] = field(default_factory=dict)
    workers: int = 1


class Case(Protocol):
    """One call and its truth. ``x`` are the activations, by whose size emulators choose what they can run."""

    x: np.ndarray
    workers: int

    def call(self) -> Call: ...

    def check(self, *outputs: np.ndarray) -> float:
        """Asserts that ``outputs``, in the order of the call's, are right; returns the largest error, as a share of what the
        definition allows (0: the reference's bits).
        """


def unwritten(shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
    """An output before its call: what a kernel forgets to write shows."""
    array = np.empty(shape, dtype)
    array.reshape(-1).view(np.uint8)[:] = 0xA5
    return array
