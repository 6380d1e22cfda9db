"""Channel-major 2-bit ternary weights: the one layout in the file for every CPU.

A weight matrix W of shape [N, K] (as in ``nn.Linear``) with values -1, 0, 1 is stored as uint8 [K, row_bytes(N)]:
row k holds input channel k for every output, so that an inactive channel is bytes not read. Byte j of a row holds the
outputs n = 4j .. 4j+3; the code of output 4j+p is ``W[4j+p, k] + 1`` (0, 1 or 2) in the bits 2p and 2p+1 (little end
first). N is padded to a multiple of 128 outputs (32 bytes, one AVX2 register, half a cache line) with code 1, a zero
weight; code 3 never occurs.
"""

from __future__ import annotations

import numpy as np

TILE_OUTPUTS = 128


def row_bytes(n: int) -> int:
    """Bytes of one packed row (one input channel) of ``n`` outputs."""
    return -(-n // TILE_OUTPUTS) * (TILE_OUTPUTS // 4)


def pack(values: np.ndarray) -> np.ndarray:
    """int8 [N, K] of -1, 0, 1 to uint8 [K, row_bytes(N)]; ValueError on any other value."""
    n, k = values.shape
    if values.size and (values.min() < -1 or values.max() > 1):
        raise ValueError(f"values from {values.min()} to {values.max()}; ternary weights are -1, 0 or 1")
    codes = np.ones((row_bytes(n) * 4, k), np.uint8)
    np.add(values, 1, out=codes[:n], casting="unsafe")
    planes = codes.reshape(row_bytes(n), 4, k)
    packed = planes[:, 0] | planes[:, 1] << 2 | planes[:, 2] << 4 | planes[:, 3] << 6
    return np.ascontiguousarray(packed.T)  # transposed last, when it is a quarter of the size


def unpack(packed: np.ndarray, n: int) -> np.ndarray:
    """uint8 [K, row_bytes(N)] to int8 [N, K]; ValueError when the row length does not fit ``n``."""
    k, width = packed.shape
    if width != row_bytes(n):
        raise ValueError(f"rows of {width} bytes; {n} outputs take {row_bytes(n)}")
    codes = packed[..., None] >> np.array([0, 2, 4, 6], np.uint8) & 3
    return np.ascontiguousarray((codes.reshape(k, 4 * width)[:, :n].astype(np.int8) - 1).T)
