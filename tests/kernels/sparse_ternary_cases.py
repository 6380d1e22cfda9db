"""SparseTernaryMatMul: cases and their truth in NumPy."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from kernel_call import ELEMENT_TYPES, Call, unwritten
from kernel_inputs import KINDS, ROWS, as_type, magnitudes
from ternary_cases import ternary_reference, ternary_weights
from topk_cases import topk_reference

from qsparse_export.formats import ternary

LEAST_CASES = 94


class Args(ctypes.Structure):
    """qsk_sparse_ternary_matmul_args."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("x", ctypes.c_void_p),
        ("w", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
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
class SparseTernary:
    """A selection and several matrices [n_i, k] on the same x."""

    x: np.ndarray
    matrices: tuple[np.ndarray, ...]
    k: int
    block: int = 0
    rescale: bool = False
    workers: int = 1

    @property
    def scales(self) -> np.ndarray:
        return np.linspace(0.01, 0.3, len(self.matrices)).astype(np.float32)

    def call(self) -> Call:
        (m, k), n = self.x.shape, np.array([len(weights) for weights in self.matrices], np.int64)
        args = Args(type=ELEMENT_TYPES[self.x.dtype], matrices=len(n), m=m, k=k, top_k=self.k, block=self.block)
        args.rescale_l2 = self.rescale
        inputs = {"x": self.x, "w": self.packed(), "scales": self.scales, "n": n}
        return Call(
            "qsk_sparse_ternary_matmul", args, inputs, {"y": unwritten((m, n.sum()), self.x.dtype)}, self.workers
        )

    def packed(self) -> np.ndarray:
        """The packed matrices side by side."""
        parts = [ternary.pack(weights) for weights in self.matrices]
        return (
            np.ascontiguousarray(np.concatenate(parts, axis=1)) if parts else np.zeros((self.x.shape[1], 0), np.uint8)
        )

    def check(self, y: np.ndarray) -> float:
        masked = topk_reference(self.x, self.k, self.block, self.rescale)
        parts = [
            ternary_reference(masked, weights, scale) for weights, scale in zip(self.matrices, self.scales, strict=True)
        ]
        shapes = [weights.shape for weights in self.matrices]
        expected = np.concatenate(parts, axis=1) if parts else np.zeros((len(self.x), 0), self.x.dtype)
        np.testing.assert_array_equal(y, expected, err_msg=f"{self.x.shape} {shapes} {self.k} {self.workers}")
        return 0.0


def cases(rng: np.random.Generator) -> Iterator[SparseTernary]:
    splits = ((), (0,), (130,), (128, 128, 128), (1, 127, 129), (64, 0, 200, 3), (256, 513), (2560, 640, 640))
    for i, kind in enumerate(KINDS):
        for j, width in enumerate((1, 31, 64, 129, 513)):
            m, split = ROWS[(i + 3 * j) % len(ROWS)], splits[(i + j) % len(splits)]
            x = as_type(magnitudes(rng, m, width, kind), np.float16 if (i + j) % 3 == 0 else np.float32)
            matrices = tuple(ternary_weights(rng, n, width, kind) for n in split)
            block = (0, 32, 0, 7)[(i + j) % 4]
            yield SparseTernary(x, matrices, (block or width) * (i % 4) // 3, block, (i + j) % 5 == 0, 1 + j % 3)
    for m in (1, 2, 8, 9, 33):
        x = magnitudes(rng, m, 1024, "normal")
        matrices = tuple(ternary_weights(rng, n, 1024, "normal") for n in (640, 130, 130))
        for k in (300, 1024):
            yield SparseTernary(x, matrices, k, workers=2)
    for k in (1, 8, 9, 15, 16, 17, 24, 25, 31, 32, 33, 65):  # rows of several passes, sums as large as can be
        x = np.where(rng.random((1, k)) < 0.5, -1.0, 1.0).astype(np.float32)
        largest = np.repeat(np.sign(x), 4100, axis=0).astype(np.int8)
        for matrices in ((largest, -largest), (largest[:2100], ternary_weights(rng, 460, k, "normal"))):
            yield SparseTernary(x, matrices, max(1, k - k // 4), workers=1 + k % 2)
    for kind in ("normal", "equal", "ties"):  # more than bytes can count in one slice
        yield SparseTernary(magnitudes(rng, 1, 70000, kind), (ternary_weights(rng, 3, 70000, kind),), 28000)
    for kind in ("normal", "outlier", "ties"):
        for k in (1, 100, 1092, 2600, 2729):
            yield SparseTernary(magnitudes(rng, 2, 2730, kind), (ternary_weights(rng, 130, 2730, kind),), k, workers=2)
