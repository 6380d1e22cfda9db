"""TernaryMatMul: cases and their truth in NumPy."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from kernel_call import ELEMENT_TYPES, Call, unwritten
from kernel_inputs import KINDS, OUTPUTS, ROWS, WIDTHS, as_type, magnitudes
from quantize_cases import quantize_reference

from qsparse_export.formats import ternary

LEAST_CASES = 300


def ternary_reference(x: np.ndarray, weights: np.ndarray, scale: float) -> np.ndarray:
    """TernaryMatMul on x [m, k] and weights int8 [n, k]."""
    q, gamma = quantize_reference(x.astype(np.float32))
    # exact: whole numbers below 2**53
    sums = (q.astype(np.float64) @ weights.T.astype(np.float64)).astype(np.int64).astype(np.int32)
    with np.errstate(over="ignore", invalid="ignore"):
        return (sums.astype(np.float32) * ((gamma / np.float32(127)) * np.float32(scale))[:, None]).astype(x.dtype)


class Args(ctypes.Structure):
    """qsk_ternary_matmul_args."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("x", ctypes.c_void_p),
        ("w", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("y", ctypes.c_void_p),
        ("m", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("n", ctypes.c_int64),
    )


@dataclass(frozen=True)
class Ternary:
    x: np.ndarray
    weights: np.ndarray
    scale: float = 0.037
    workers: int = 1
    pad_byte: int | None = None

    def call(self) -> Call:
        (m, k), n = self.x.shape, len(self.weights)
        packed = ternary.pack(self.weights)
        if self.pad_byte is not None:
            packed[:, -(-n // 4) :] = self.pad_byte
        args = Args(ELEMENT_TYPES[self.x.dtype], None, None, self.scale, None, m, k, n)
        outputs = {"y": unwritten((m, n), self.x.dtype)}
        return Call("qsk_ternary_matmul", args, {"x": self.x, "w": packed}, outputs, self.workers)

    def check(self, y: np.ndarray) -> float:
        expected = ternary_reference(self.x, self.weights, self.scale)
        np.testing.assert_array_equal(y, expected, err_msg=f"{self.x.shape} {self.weights.shape} {self.workers}")
        return 0.0


def ternary_weights(rng: np.random.Generator, n: int, k: int, kind: str) -> np.ndarray:
    if kind in ("one", "equal"):  # the largest sums: activations and weights all of one sign
        return np.ones((n, k), np.int8)
    return rng.integers(-1, 2, (n, k)).astype(np.int8)


def cases(rng: np.random.Generator) -> Iterator[Ternary]:
    for i, kind in enumerate(KINDS):
        for j, k in enumerate(WIDTHS):
            m, n = ROWS[(i + 3 * j) % len(ROWS)], OUTPUTS[(5 * i + j) % len(OUTPUTS)]
            dtype = np.float16 if (i + j) % 4 == 0 else np.float32
            x = as_type(magnitudes(rng, m, k, kind), dtype)
            yield Ternary(x, ternary_weights(rng, n, k, kind), workers=1 + (i + j) % 3)
    for m in (1, 2, 3, 7, 8, 16, 33, 65, 131):
        for dtype in (np.float32, np.float16):
            x = as_type(magnitudes(rng, m, 1024, "sparse"), dtype)
            x[:, rng.random(1024) < 0.5] = 0  # channels that no row uses
            yield Ternary(x, ternary_weights(rng, 513, 1024, "sparse"), workers=2)
    for m in (1, 4, 8):  # int16 sums at their limits, both signs
        for kind in ("one", "equal"):
            yield Ternary(magnitudes(rng, m, 2730, kind), ternary_weights(rng, 130, 2730, kind))
    # Tiles of 1,024 outputs and groups of 16 rows and 32 channels, which tables of partial sums have.
    for m, k, n, kind in (
        (16, 1, 1023, "normal"),
        (16, 31, 1024, "normal"),
        (31, 32, 1025, "ties"),
        (32, 33, 1152, "normal"),
        (48, 300, 2177, "sparse"),
        (128, 64, 1100, "normal"),
        (130, 95, 1030, "normal"),
        (257, 40, 129, "normal"),
        (16, 2730, 260, "one"),
        (64, 2730, 1500, "equal"),
    ):
        for dtype in (np.float32, np.float16):
            x = as_type(magnitudes(rng, m, k, kind), dtype)
            yield Ternary(x, ternary_weights(rng, n, k, kind), workers=1 + m % 3, pad_byte=0xFF)
    for m in (1, 5):
        for workers in (1, 2, 3, 8):
            x = magnitudes(np.random.default_rng(5), m, 2730, "sparse")
            yield Ternary(x, ternary_weights(np.random.default_rng(6), 2730, 2730, "sparse"), workers=workers)
