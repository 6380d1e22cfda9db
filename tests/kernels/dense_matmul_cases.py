"""DenseMatMulNBits: cases and their truth in NumPy, within the rounding that float32 sums may have."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from error_share import error_share
from kernel_call import ELEMENT_TYPES, Call, unwritten
from kernel_inputs import KINDS, ROWS, as_type, magnitudes
from sparse_matmul_cases import EPS, FIXED_POINT, LEAST_MAGNITUDE, SMALLEST, largest_of_group

from qsparse_export.formats import nbits

LEAST_CASES = 150


class Args(ctypes.Structure):
    """qsk_dense_matmul_nbits_args."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("x", ctypes.c_void_p),
        ("w", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("m", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("bits", ctypes.c_int64),
        ("group", ctypes.c_int64),
    )


@dataclass(frozen=True)
class DenseMatMul:
    """x [m, k] times codes int8 [n, k] with scales float16 [n, groups]."""

    x: np.ndarray
    codes: np.ndarray
    scales: np.ndarray
    bits: int
    group: int
    workers: int = 1

    def call(self) -> Call:
        (m, k), n = self.x.shape, len(self.codes)
        args = Args(type=ELEMENT_TYPES[self.x.dtype], m=m, k=k, n=n, bits=self.bits, group=self.group)
        inputs = {"x": self.x, "w": nbits.pack_outputs(self.codes, self.bits), "scales": self.scales}
        return Call("qsk_dense_matmul_nbits", args, inputs, {"y": unwritten((m, n), self.x.dtype)}, self.workers)

    def check(self, y: np.ndarray) -> float:
        wide = self.scales[:, np.arange(self.x.shape[1]) // self.group].astype(np.float64)
        x = self.x.astype(np.float64)
        good = np.isfinite(x).all(axis=1)
        assert np.isnan(y[~good]).all()
        expected = x[good] @ (self.codes * wide).T
        weights = ((np.abs(self.codes.astype(np.float64)) + (1 << self.bits - 1)) * wide).T
        rounding = largest_of_group(x[good], 256 // self.bits) * FIXED_POINT + LEAST_MAGNITUDE
        allowed = (2 * (self.x.shape[1] + 16) * EPS * np.abs(x[good]) + rounding) @ weights + SMALLEST
        with np.errstate(over="ignore"):
            rounded = expected.astype(np.float32).astype(y.dtype).astype(np.float64)
        if y.dtype == np.float16:
            allowed = allowed + 2.0**-10 * np.abs(expected) + 2.0**-24
        label = f"{self.x.shape} {self.x.dtype} n {len(self.codes)} bits {self.bits} group {self.group}"
        return error_share(y[good], rounded, allowed, label)


def cases(rng: np.random.Generator) -> Iterator[DenseMatMul]:
    outputs = (0, 1, 3, 130, 257)
    forms = ((8, 32), (8, 128), (8, 24), (4, 32), (4, 64), (4, 16), (4, 104), (8, 700))
    widths = (1, 2, 31, 64, 65, 129, 576)
    for i, kind in enumerate(KINDS):
        for j, width in enumerate(widths):
            for f in range(2):
                bits, group = forms[(i + j + 3 * f) % len(forms)]
                dtype = np.float16 if (i + f) % 3 == 0 else np.float32
                scale = 1e-10 if kind == "huge" and dtype == np.float32 else 1  # sums within float32
                x = as_type(magnitudes(rng, ROWS[(i + j) % len(ROWS)], width, kind) * np.float32(scale), dtype)
                yield _case(rng, x, outputs[(i + j + f) % len(outputs)], bits, group, 1 + j % 3)
    for bits, group in forms:
        for m in (1, 4, 7):
            yield _case(rng, magnitudes(rng, m, 600, "normal"), 700, bits, group, 2)


def _case(rng: np.random.Generator, x: np.ndarray, n: int, bits: int, group: int, workers: int) -> DenseMatMul:
    zero = 1 << bits - 1
    codes = rng.integers(-zero, zero, (n, x.shape[1])).astype(np.int8)
    scales = rng.uniform(0.001, 0.2, (n, nbits.group_count(x.shape[1], group))).astype(np.float16)
    return DenseMatMul(x, codes, scales, bits, group, workers)
