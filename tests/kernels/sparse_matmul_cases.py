"""SparseMatMul and SparseMatMulNBits: cases and their truth in NumPy, within the rounding that float32 sums may have."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from error_share import error_share
from kernel_call import ELEMENT_TYPES, Call, unwritten
from kernel_inputs import KINDS, ROWS, as_type, magnitudes
from topk_cases import topk_reference

from qsparse_export.formats import nbits

LEAST_CASES = 200
INT_TYPES = {8: 3, 4: 4}
"""QSK_INT8 and QSK_INT4 of qsk/status.h."""
EPS = 2.0**-24
SMALLEST = 2.0**-126
FIXED_POINT = 1 / 65534
"""Integer weights: activations are rounded to multiples of the largest of their group / 32767, by at most half of one."""
LEAST_MAGNITUDE = 2.0**-100
"""Below it activations count as zero."""


def largest_of_group(x: np.ndarray, group: int) -> np.ndarray:
    """|x| [rows, k] with every value replaced by the largest of its ``group`` consecutive ones."""
    magnitude = np.abs(x)
    starts = np.arange(0, x.shape[1], group)
    if not len(starts):
        return magnitude
    return np.repeat(np.maximum.reduceat(magnitude, starts, axis=1), group, axis=1)[:, : x.shape[1]]


class Args(ctypes.Structure):
    """qsk_sparse_matmul_args."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("x", ctypes.c_void_p),
        ("weight_type", ctypes.c_int),
        ("w", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("group", ctypes.c_int64),
        ("n", ctypes.c_void_p),
        ("matrices", ctypes.c_int64),
        ("y", ctypes.c_void_p),
        ("m", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("top_k", ctypes.c_int64),
        ("block", ctypes.c_int64),
        ("rescale_l2", ctypes.c_int),
    )


@dataclass(frozen=True)
class Weights:
    """Matrices [n_i, k] side by side as a call takes them; ``values`` float64 [sum n_i, k] is what they mean.

    ``uncertain``: beyond |values|, what a kernel may add and subtract again (the zero point of integer codes).
    """

    type: int
    rows: np.ndarray
    scales: np.ndarray
    group: int
    outputs: tuple[int, ...]
    values: np.ndarray
    uncertain: np.ndarray


def float_weights(rng: np.random.Generator, outputs: tuple[int, ...], k: int, dtype: type) -> Weights:
    values = rng.standard_normal((sum(outputs), k)).astype(dtype)
    none = np.zeros(0, np.float16)
    rows = np.ascontiguousarray(values.T)
    zeros = np.zeros(values.shape)
    return Weights(ELEMENT_TYPES[values.dtype], rows, none, 0, outputs, values.astype(np.float64), zeros)


def integer_weights(rng: np.random.Generator, outputs: tuple[int, ...], k: int, bits: int, group: int) -> Weights:
    rows, scales, values, uncertain = [], [], [], []
    zero = 1 << bits - 1
    for n in outputs:
        codes = rng.integers(-zero, zero, (n, k)).astype(np.int8)
        scale = np.zeros((nbits.group_count(k, group), nbits.columns(n)), np.float16)
        scale[:, :n] = rng.uniform(0.001, 0.2, (len(scale), n))
        wide = scale[np.arange(k) // group, :n].T.astype(np.float64)
        rows.append(nbits.pack_channels(codes, bits))
        scales.append(scale)
        values.append(codes * wide)
        uncertain.append(zero * wide)
    joined = (np.ascontiguousarray(np.concatenate(parts, axis=1)) for parts in (rows, scales))
    stacked = (np.concatenate(parts) for parts in (values, uncertain))
    return Weights(INT_TYPES[bits], *joined, group, outputs, *stacked)


@dataclass(frozen=True)
class SparseMatMul:
    """A selection and several matrices on the same x; ``fixed_point``: activations may be rounded to 16 bits."""

    x: np.ndarray
    weights: Weights
    k: int
    block: int = 0
    rescale: bool = False
    workers: int = 1
    fixed_point: bool = True

    def call(self) -> Call:
        (m, k), n = self.x.shape, np.array(self.weights.outputs, np.int64)
        args = Args(type=ELEMENT_TYPES[self.x.dtype], weight_type=self.weights.type, group=self.weights.group)
        args.matrices, args.m, args.k, args.top_k, args.block = len(n), m, k, self.k, self.block
        args.rescale_l2 = self.rescale
        inputs = {"x": self.x, "w": self.weights.rows, "scales": self.weights.scales, "n": n}
        return Call("qsk_sparse_matmul", args, inputs, {"y": unwritten((m, n.sum()), self.x.dtype)}, self.workers)

    def check(self, y: np.ndarray) -> float:
        masked = topk_reference(self.x, self.k, self.block, self.rescale).astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            expected = masked @ self.weights.values.T
        bad = ~np.isfinite(masked).all(axis=1)
        if self.weights.group:
            expected[bad] = np.nan
        label = f"x {self.x.shape} {self.x.dtype} n {self.weights.outputs} type {self.weights.type} k {self.k} {self.workers}"
        np.testing.assert_array_equal(np.isnan(y), np.isnan(expected), err_msg=label)
        np.testing.assert_array_equal(np.isinf(y[bad]), np.isinf(expected[bad]), err_msg=label)
        size = np.abs(masked[~bad]) @ (np.abs(self.weights.values) + self.weights.uncertain).T
        roundings = self.x.shape[1] + 16  # one per channel; per group, part and store; of x where it is rescaled
        allowed = 2 * roundings * EPS * size + SMALLEST
        if self.weights.group and self.fixed_point:
            rounding = largest_of_group(masked[~bad], self.weights.group) * FIXED_POINT + LEAST_MAGNITUDE
            allowed = allowed + rounding @ (np.abs(self.weights.values) + self.weights.uncertain).T
        with np.errstate(over="ignore"):
            rounded = expected[~bad].astype(np.float32).astype(y.dtype).astype(np.float64)
        if y.dtype == np.float16:
            allowed = allowed + 2.0**-10 * np.abs(expected[~bad]) + 2.0**-24
        infinity = (
            65536.0 if y.dtype == np.float16 else np.inf
        )  # what rounds to it and what just does not are neighbours
        found = np.clip(y[~bad].astype(np.float64), -infinity, infinity)
        return error_share(found, np.clip(rounded, -infinity, infinity), allowed, label)


def cases(rng: np.random.Generator) -> Iterator[SparseMatMul]:
    splits = ((), (0,), (130,), (64, 64, 64), (1, 63, 65), (64, 0, 200, 3), (256, 513), (576, 192, 192))
    formats = (np.float32, np.float16, (8, 32), (8, 128), (4, 16), (4, 32), (4, 100))
    for i, kind in enumerate(KINDS):
        for j, width in enumerate((1, 31, 64, 129, 513)):
            for f in range((i + j) % 2, len(formats), 2):
                form = formats[f]
                m, split = ROWS[(i + 3 * j + f) % len(ROWS)], splits[(i + j + 2 * f) % len(splits)]
                dtype = np.float16 if (i + j + f) % 3 == 0 else np.float32
                scale = 1e-10 if kind == "huge" and dtype == np.float32 else 1  # sums within float32
                x = as_type(magnitudes(rng, m, width, kind) * np.float32(scale), dtype)
                weights = (
                    integer_weights(rng, split or (), width, *form)
                    if isinstance(form, tuple) and split
                    else float_weights(rng, split, width, form if isinstance(form, type) else np.float32)
                )
                block = (0, 32, 0, 7)[(i + j) % 4]
                kept = (block or width) * (1 + i % 4) // 4
                yield SparseMatMul(x, weights, kept, block, (i + j) % 5 == 0, 1 + (j + f) % 3)
    for m in (1, 2, 8, 9, 33, 250):  # beyond a tile of rows
        x = magnitudes(rng, m, 1024, "normal")
        for form in formats:
            weights = (
                integer_weights(rng, (640, 130, 130), 1024, *form)
                if isinstance(form, tuple)
                else float_weights(rng, (640, 130, 130), 1024, form)
            )
            for k in (300, 1024) if m < 250 else (1024,):
                yield SparseMatMul(x, weights, k, workers=2)
