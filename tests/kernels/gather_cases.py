"""GatherNBits: cases and their truth in NumPy."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from kernel_call import Call, unwritten

from qsparse_export.formats import nbits

LEAST_CASES = 40


class Args(ctypes.Structure):
    """qsk_gather_nbits_args."""

    _fields_ = (
        ("ids", ctypes.c_void_p),
        ("w", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("bits", ctypes.c_int64),
        ("group", ctypes.c_int64),
    )


@dataclass(frozen=True)
class Gather:
    """Rows ``x`` (ids) of codes int8 [n, k] with scales float16 [n, groups]."""

    x: np.ndarray
    codes: np.ndarray
    scales: np.ndarray
    bits: int
    group: int
    workers: int = 2

    def call(self) -> Call:
        n, k = self.codes.shape
        args = Args(count=len(self.x), k=k, n=n)
        args.bits, args.group = self.bits, self.group
        inputs = {"ids": self.x, "w": nbits.pack_outputs(self.codes, self.bits), "scales": self.scales}
        return Call("qsk_gather_nbits", args, inputs, {"y": unwritten((len(self.x), k), np.float32)}, self.workers)

    def check(self, y: np.ndarray) -> float:
        group_of = np.arange(self.codes.shape[1]) // self.group
        expected = self.codes[self.x] * self.scales[self.x][:, group_of].astype(np.float32)
        np.testing.assert_array_equal(y, expected)
        return 0.0


def cases(rng: np.random.Generator) -> Iterator[Gather]:
    for bits, group in ((8, 32), (8, 100), (4, 32), (4, 7), (4, 256)):
        for k in (1, 33, 64, 127, 576):
            for most in (1, 90):
                n, count = int(rng.integers(1, most + 1)), int(rng.integers(0, 9))
                zero = 1 << bits - 1
                codes = rng.integers(-zero, zero, (n, k)).astype(np.int8)
                scales = rng.uniform(0.001, 0.2, (n, nbits.group_count(k, group))).astype(np.float16)
                yield Gather(rng.integers(0, n, count), codes, scales, bits, group)
