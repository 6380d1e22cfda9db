"""GatedActivation: cases and their truth in NumPy."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from error_share import error_share
from kernel_call import ELEMENT_TYPES, Call, unwritten
from kernel_inputs import KINDS, ROWS, WIDTHS, as_type, magnitudes

LEAST_CASES = 300
ACTIVATIONS = {"relu2": 1, "silu": 2}  # QSK_RELU2 and QSK_SILU of qsk/gated_activation.h


class Args(ctypes.Structure):
    """qsk_gated_activation_args."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("activation", ctypes.c_int),
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("n", ctypes.c_int64),
    )


@dataclass(frozen=True)
class GatedActivation:
    """``x`` is [rows, 2n]: gate and up."""

    x: np.ndarray
    activation: str
    workers: int = 1

    def call(self) -> Call:
        rows, n = len(self.x), self.x.shape[1] // 2
        args = Args(type=ELEMENT_TYPES[self.x.dtype], activation=ACTIVATIONS[self.activation], rows=rows, n=n)
        outputs = {"y": unwritten((rows, n), np.float32)}
        return Call("qsk_gated_activation", args, {"x": self.x}, outputs, self.workers)

    def check(self, y: np.ndarray) -> float:
        gate, up = np.split(self.x.astype(np.float32), 2, axis=1)
        with np.errstate(all="ignore"):
            if self.activation == "relu2":
                positive = np.where(gate < 0, np.float32(0), gate)
                np.testing.assert_array_equal(y, positive * positive * up)
                return 0.0
            wide = gate.astype(np.float64)
            silu = (wide * np.where(wide < 0, np.exp(wide), 1) / (1 + np.exp(-np.abs(wide)))).astype(np.float32)
            expected = silu * up
        # Six roundings of half a unit; below e^-87 the weight of a negative gate is 0.
        vanishes = gate < -80
        with np.errstate(all="ignore"):
            assert not (np.abs(y[vanishes]) > 1e-32 * np.abs(up[vanishes])).any()
            allowed = 6 * 2.0**-23 * np.abs(expected.astype(np.float64)) + 1e-40
        return error_share(y[~vanishes], expected[~vanishes], allowed[~vanishes], str(self.x.shape))


def cases(rng: np.random.Generator) -> Iterator[GatedActivation]:
    for i, kind in enumerate(KINDS):
        for j, width in enumerate(WIDTHS):
            dtype = np.float16 if (i + j) % 3 == 0 else np.float32
            x = as_type(magnitudes(rng, ROWS[(i + j) % len(ROWS)], 2 * width, kind), dtype)
            yield GatedActivation(x, ("relu2", "silu")[(i + j) % 2])
    for activation in ACTIVATIONS:
        for dtype in (np.float32, np.float16):
            yield GatedActivation(magnitudes(rng, 15, 2 * 3000, "normal").astype(dtype), activation, 3)
    # Gates that float16 holds and whose squares it does not.
    yield GatedActivation(np.linspace(-60000, 60000, 400).astype(np.float16).reshape(2, 200), "relu2")
    yield GatedActivation(np.linspace(-200, 200, 4000).astype(np.float32).reshape(4, 1000), "silu")
