"""TopKSparsify: cases and their truth in NumPy."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from kernel_call import ELEMENT_TYPES, Call, unwritten
from kernel_inputs import KINDS, WIDTHS, as_type, magnitudes

LEAST_CASES = 300


def topk_reference(x: np.ndarray, k: int, block: int, rescale: bool) -> np.ndarray:
    """TopKSparsify on [rows, width]."""
    wide = x.astype(np.float32)
    out = np.zeros_like(wide)
    width = x.shape[1]
    for start in range(0, width, block or max(width, 1)):
        piece = slice(start, min(start + (block or width), width))
        magnitude = np.where(np.isnan(wide[:, piece]), np.inf, np.abs(wide[:, piece]))
        order = np.argsort(-magnitude, axis=1, kind="stable")[:, :k]
        np.put_along_axis(out[:, piece], order, np.take_along_axis(wide[:, piece], order, 1), 1)
    out[np.isnan(wide)] = np.nan
    if rescale:
        with np.errstate(over="ignore", invalid="ignore"):
            out /= np.maximum(np.sqrt(square_sums(out)), np.float32(1e-12))[:, None]
            return out.astype(x.dtype)
    return out.astype(x.dtype)


def square_sums(rows: np.ndarray) -> np.ndarray:
    """float32 [rows] of float32 [rows, width], added in the kernels' order: channel i to sum i % 16, then the sums."""
    padded = np.zeros((len(rows), -(-rows.shape[1] // 16) * 16), np.float32)
    padded[:, : rows.shape[1]] = rows * rows
    sums = np.zeros((len(rows), 16), np.float32)
    for start in range(0, padded.shape[1], 16):
        sums += padded[:, start : start + 16]
    return np.add.accumulate(sums, axis=1)[:, -1]


class Args(ctypes.Structure):
    """qsk_topk_sparsify_args."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("block", ctypes.c_int64),
        ("rescale_l2", ctypes.c_int),
    )


@dataclass(frozen=True)
class TopK:
    x: np.ndarray
    k: int
    block: int = 0
    rescale: bool = False
    workers: int = 1

    def call(self) -> Call:
        args = Args(ELEMENT_TYPES[self.x.dtype], None, None, *self.x.shape, self.k, self.block, self.rescale)
        outputs = {"y": unwritten(self.x.shape, self.x.dtype)}
        return Call("qsk_topk_sparsify", args, {"x": self.x}, outputs, self.workers)

    def check(self, y: np.ndarray) -> float:
        expected = topk_reference(self.x, self.k, self.block, self.rescale)
        np.testing.assert_array_equal(y, expected, err_msg=str(self))
        dropped = (y == 0) & (self.x != 0)
        assert self.rescale or not np.signbit(y[dropped]).any(), "what is not kept is +0"
        return 0.0


def cases(rng: np.random.Generator) -> Iterator[TopK]:
    for kind in KINDS:
        for width in WIDTHS:
            dtype = np.float16 if (width + len(kind)) % 3 == 0 else np.float32
            x = as_type(magnitudes(rng, 2, width, kind), dtype)
            for k in sorted({0, 1, width // 3, width - 1, width} & set(range(width + 1))):
                yield TopK(x, k)
    for width, block, k in (
        (2730, 32, 16),
        (96, 32, 16),
        (100, 32, 16),
        (33, 32, 32),
        (40, 7, 3),
        (5, 9, 9),
        (64, 32, 0),
    ):
        for dtype in (np.float32, np.float16):
            for kind in ("normal", "ties", "nan and inf"):
                yield TopK(as_type(magnitudes(rng, 3, width, kind), dtype), k, block)
    for workers in (1, 2, 3, 8):
        yield TopK(magnitudes(rng, 33, 2730, "normal"), 1000, 0, False, workers)
        yield TopK(as_type(magnitudes(rng, 33, 2730, "ties"), np.float16), 16, 32, True, workers)
    for kind in ("normal", "zero", "huge", "tiny", "nan", "inf"):
        for dtype in (np.float32, np.float16):
            yield TopK(as_type(magnitudes(rng, 3, 513, kind), dtype), 200, 0, True)
    yield TopK(magnitudes(rng, 1, 2730, "normal"), 1092)
    yield TopK(magnitudes(rng, 1, 70000, "equal"), 12345)
    yield TopK(magnitudes(rng, 1, 600000, "mixed"), 60001)  # more than one slice of 16-bit counts
