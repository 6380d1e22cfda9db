"""TVM tensors over memory of NumPy, which both see: a hundred times cheaper to make than TVM's own."""

from __future__ import annotations

from typing import Any

import numpy as np

from qsparse_export.runtimes.tvm.environment import tvm

ALIGNMENT_BYTES = 64
"""Of every tensor: TVM's generated code takes it for granted."""


def is_aligned(array: np.ndarray) -> bool:
    """Whether the memory of ``array`` begins as TVM wants it."""
    return array.__array_interface__["data"][0] % ALIGNMENT_BYTES == 0


def aligned_zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A new array of zeros whose memory TVM takes."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = np.zeros(size + ALIGNMENT_BYTES, np.uint8)
    begin = -memory.__array_interface__["data"][0] % ALIGNMENT_BYTES
    return memory[begin : begin + size].view(dtype).reshape(shape)


def aligned_empty(size_bytes: int) -> np.ndarray:
    """New bytes, not written to, that begin as TVM wants them."""
    memory = np.empty(size_bytes + ALIGNMENT_BYTES, np.uint8)
    begin = -memory.__array_interface__["data"][0] % ALIGNMENT_BYTES
    return memory[begin : begin + size_bytes]


def over(array: np.ndarray) -> Any:
    """The tensor that shares the memory of an aligned, contiguous ``array``, and keeps it alive."""
    return tvm().runtime.from_dlpack(array)


def copied(array: np.ndarray) -> Any:
    """A tensor with the values of any ``array``, in memory of its own."""
    if not array.size:  # NumPy's views of nothing begin anywhere
        return tvm().runtime.empty(array.shape, array.dtype.name)
    memory = aligned_zeros(array.shape, array.dtype)
    memory[...] = array
    return over(memory)
