"""Absmax int8 quantisation: cases and their truth in NumPy."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from kernel_call import Call, unwritten
from kernel_inputs import KINDS, WIDTHS, magnitudes

LEAST_CASES = 300
GAMMA_FLOOR = np.float32(1e-5)


def quantize_reference(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(q int8 [rows, width], gamma float32 [rows]) of float32 [rows, width]; NaN gamma and zeros for a bad row."""
    finite = np.isfinite(x).all(1) if x.shape[1] else np.ones(len(x), bool)
    rows = np.where(finite[:, None], x, np.float32(0))
    gamma = np.maximum(np.abs(rows).max(1, initial=0), GAMMA_FLOOR).astype(np.float32)
    q = np.clip(np.rint((np.float32(127) / gamma)[:, None] * rows), -128, 127).astype(np.int8)
    return q, np.where(finite, gamma, np.float32(np.nan))


class Args(ctypes.Structure):
    """qsk_quantize_rows_args."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("q", ctypes.c_void_p),
        ("gamma", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
    )


@dataclass(frozen=True)
class Quantize:
    x: np.ndarray
    workers: int = 1

    def call(self) -> Call:
        outputs = {"q": unwritten(self.x.shape, np.int8), "gamma": unwritten(self.x.shape[:1], np.float32)}
        return Call("qsk_quantize_rows", Args(None, None, None, *self.x.shape), {"x": self.x}, outputs, self.workers)

    def check(self, q: np.ndarray, gamma: np.ndarray) -> float:
        expected_q, expected_gamma = quantize_reference(self.x)
        np.testing.assert_array_equal(q, expected_q)
        np.testing.assert_array_equal(gamma, expected_gamma)
        return 0.0


def cases(rng: np.random.Generator) -> Iterator[Quantize]:
    for kind in KINDS:
        for width in WIDTHS:
            yield Quantize(magnitudes(rng, 2, width, kind))
    for workers in (1, 2, 3, 5):
        yield Quantize(magnitudes(rng, 33, 2730, "normal"), workers)
