"""AddRmsNorm: cases and their truth in NumPy."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from error_share import error_share
from kernel_call import ELEMENT_TYPES, Call, unwritten
from kernel_inputs import KINDS, ROWS, WIDTHS, as_type, magnitudes

LEAST_CASES = 300


class Args(ctypes.Structure):
    """qsk_add_rms_norm_args."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("x", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("sum", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("epsilon", ctypes.c_float),
    )


@dataclass(frozen=True)
class AddRmsNorm:
    """``x`` and ``residual`` are [rows, n], ``weight`` is [n]."""

    x: np.ndarray
    residual: np.ndarray
    weight: np.ndarray
    epsilon: float = 1e-5
    workers: int = 1

    def call(self) -> Call:
        rows, n = self.x.shape
        args = Args(type=ELEMENT_TYPES[self.x.dtype], rows=rows, n=n, epsilon=self.epsilon)
        inputs = {"x": self.x, "residual": self.residual, "weight": self.weight}
        outputs = {"sum": unwritten(self.x.shape, self.x.dtype), "y": unwritten(self.x.shape, self.x.dtype)}
        return Call("qsk_add_rms_norm", args, inputs, outputs, self.workers)

    def check(self, total: np.ndarray, y: np.ndarray) -> float:
        with np.errstate(all="ignore"):
            expected = (self.x.astype(np.float32) + self.residual.astype(np.float32)).astype(self.x.dtype)
            np.testing.assert_array_equal(total, expected)
            wide = expected.astype(np.float32).astype(np.float64)
            square = np.mean(wide**2, axis=1, keepdims=True) if wide.shape[1] else np.zeros((len(wide), 1))
            square = square.astype(np.float32).astype(np.float64)  # float32 overflows, and then the row is 0 or NaN
            norm = wide / np.sqrt(square + self.epsilon) * self.weight.astype(np.float64)
        # A sum of n squares rounds by n / 8 additions of a lane, and the root halves that.
        unit = (self.x.shape[1] / 16 + 8) * 2.0**-23 + (2.0**-10 if self.x.dtype == np.float16 else 0)
        finite = np.isfinite(square[:, 0]) & (square[:, 0] < 1e37 / max(1, self.x.shape[1]))
        tiny = 6e-8 if self.x.dtype == np.float16 else 1e-37
        assert not np.isfinite(y[~finite & np.isnan(expected).any(axis=1)]).any()
        rounded = norm[finite].astype(self.x.dtype).astype(np.float64)
        return error_share(y[finite], rounded, unit * np.abs(rounded) + tiny, str(self.x.shape))


def cases(rng: np.random.Generator) -> Iterator[AddRmsNorm]:
    for i, kind in enumerate(KINDS):
        for j, width in enumerate(WIDTHS):
            dtype = np.float16 if (i + j) % 3 == 0 else np.float32
            rows = ROWS[(i + j) % len(ROWS)]
            x, residual = (as_type(magnitudes(rng, rows, width, kind), dtype) for _ in range(2))
            weight = rng.standard_normal(width).astype(dtype)
            yield AddRmsNorm(x, residual, weight, (1e-5, 1e-6)[j % 2])
    for dtype in (np.float32, np.float16):
        for workers in (2, 3):
            x, residual = (magnitudes(rng, 20, 2730, "normal").astype(dtype) for _ in range(2))
            yield AddRmsNorm(x, residual, np.ones(2730, dtype), workers=workers)
