"""Kernel cases and their truth in NumPy.

The references here are written for speed; tests/runtimes/ort compares the same library with the ops' own references.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

GAMMA_FLOOR = np.float32(1e-5)


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
            norm = np.sqrt(np.sum(out * out, axis=1, keepdims=True, dtype=np.float32))
            out /= np.maximum(norm, np.float32(1e-12))
    return out.astype(x.dtype)


def quantize_reference(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(q int8 [rows, width], gamma float32 [rows]) of float32 [rows, width]; NaN gamma and zeros for a bad row."""
    finite = np.isfinite(x).all(1) if x.shape[1] else np.ones(len(x), bool)
    rows = np.where(finite[:, None], x, np.float32(0))
    gamma = np.maximum(np.abs(rows).max(1, initial=0), GAMMA_FLOOR).astype(np.float32)
    q = np.clip(np.rint((np.float32(127) / gamma)[:, None] * rows), -128, 127).astype(np.int8)
    return q, np.where(finite, gamma, np.float32(np.nan))


def ternary_reference(x: np.ndarray, weights: np.ndarray, scale: float) -> np.ndarray:
    """TernaryMatMul on x [m, k] and weights int8 [n, k]."""
    q, gamma = quantize_reference(x.astype(np.float32))
    # exact: whole numbers below 2**53
    sums = (q.astype(np.float64) @ weights.T.astype(np.float64)).astype(np.int64).astype(np.int32)
    with np.errstate(over="ignore", invalid="ignore"):
        return (sums.astype(np.float32) * ((gamma / np.float32(127)) * np.float32(scale))[:, None]).astype(x.dtype)


@dataclass(frozen=True)
class TopK:
    x: np.ndarray
    k: int
    block: int = 0
    rescale: bool = False
    workers: int = 1

    def check(self, y: np.ndarray) -> None:
        expected = topk_reference(self.x, self.k, self.block, self.rescale)
        if self.rescale:  # the order of a float32 sum is free: its error is at most width * eps
            tolerance = self.x.shape[1] * 2.0**-23 + (2.0**-10 if self.x.dtype == np.float16 else 0)
            np.testing.assert_allclose(y, expected, rtol=tolerance, atol=1e-7, err_msg=str(self))
        else:
            np.testing.assert_array_equal(y, expected, err_msg=str(self))
            assert not np.signbit(y[(y == 0) & (self.x != 0)]).any(), "what is not kept is +0"


@dataclass(frozen=True)
class Quantize:
    x: np.ndarray

    def check(self, q: np.ndarray, gamma: np.ndarray) -> None:
        expected_q, expected_gamma = quantize_reference(self.x)
        np.testing.assert_array_equal(q, expected_q)
        np.testing.assert_array_equal(gamma, expected_gamma)


@dataclass(frozen=True)
class Ternary:
    x: np.ndarray
    weights: np.ndarray
    scale: float = 0.037
    workers: int = 1

    def check(self, y: np.ndarray) -> None:
        expected = ternary_reference(self.x, self.weights, self.scale)
        np.testing.assert_array_equal(y, expected, err_msg=f"{self.x.shape} {self.weights.shape} {self.workers}")


@dataclass(frozen=True)
class Sparse:
    """SparseTernaryMatMul: a selection and several matrices [n_i, k] on the same x."""

    x: np.ndarray
    matrices: tuple[np.ndarray, ...]
    k: int
    block: int = 0
    workers: int = 1

    @property
    def scales(self) -> np.ndarray:
        return np.linspace(0.01, 0.3, len(self.matrices)).astype(np.float32)

    def check(self, y: np.ndarray) -> None:
        masked = topk_reference(self.x, self.k, self.block, False)
        parts = [
            ternary_reference(masked, weights, scale) for weights, scale in zip(self.matrices, self.scales, strict=True)
        ]
        shapes = [weights.shape for weights in self.matrices]
        expected = np.concatenate(parts, axis=1) if parts else np.zeros((len(self.x), 0), self.x.dtype)
        np.testing.assert_array_equal(y, expected, err_msg=f"{self.x.shape} {shapes} {self.k} {self.workers}")


Case = TopK | Quantize | Ternary | Sparse


def magnitudes(rng: np.random.Generator, rows: int, width: int, kind: str) -> np.ndarray:
    """Rows of one kind: what models have, and what breaks kernels."""
    x = rng.standard_normal((rows, width)).astype(np.float32)
    if kind == "sparse":
        x[rng.random((rows, width)) < 0.6] = 0
    elif kind == "ties":
        x = rng.integers(-3, 4, (rows, width)).astype(np.float32)
    elif kind == "equal":
        x = np.full((rows, width), -1.5, np.float32)
    elif kind == "one":
        x = np.full((rows, width), 1.0, np.float32)
    elif kind == "zero":
        x = np.zeros((rows, width), np.float32)
    elif kind == "tiny":
        x *= np.float32(1e-41)
    elif kind == "huge":
        x *= np.float32(3e37)
    elif kind == "mixed":
        x *= np.float32(10.0) ** rng.integers(-6, 5, (rows, width)).astype(np.float32)
    elif kind == "halves":  # products that end in .5: the rounding mode shows
        x = (rng.integers(-254, 255, (rows, width)) / 2).astype(np.float32)
        x[:, :1] = 127
    elif kind in ("nan", "inf", "nan and inf"):
        if "nan" in kind:
            x[rng.random((rows, width)) < 0.1] = np.nan
        if "inf" in kind:
            x[rng.random((rows, width)) < 0.1] = -np.inf
    return x


KINDS = (
    "normal",
    "sparse",
    "ties",
    "equal",
    "one",
    "zero",
    "tiny",
    "huge",
    "mixed",
    "halves",
    "nan",
    "inf",
    "nan and inf",
)
WIDTHS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300, 511, 513)
OUTPUTS = (0, 1, 3, 4, 5, 127, 128, 129, 255, 256, 257, 384, 513)
ROWS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 33)


def as_type(x: np.ndarray, dtype: type) -> np.ndarray:
    with np.errstate(over="ignore"):
        return x.astype(dtype)


def topk_cases(rng: np.random.Generator) -> Iterator[TopK]:
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
    for kind in ("normal", "zero", "huge", "tiny", "nan", "inf"):
        for dtype in (np.float32, np.float16):
            yield TopK(as_type(magnitudes(rng, 3, 513, kind), dtype), 200, 0, True)
    yield TopK(magnitudes(rng, 1, 2730, "normal"), 1092)
    yield TopK(magnitudes(rng, 1, 70000, "equal"), 12345)
    yield TopK(magnitudes(rng, 1, 600000, "mixed"), 60001)  # more than one slice of 16-bit counts


def quantize_cases(rng: np.random.Generator) -> Iterator[Quantize]:
    for kind in KINDS:
        for width in WIDTHS:
            yield Quantize(magnitudes(rng, 2, width, kind))


def ternary_weights(rng: np.random.Generator, n: int, k: int, kind: str) -> np.ndarray:
    if kind in ("one", "equal"):  # the largest sums: activations and weights all of one sign
        return np.ones((n, k), np.int8)
    return rng.integers(-1, 2, (n, k)).astype(np.int8)


def ternary_cases(rng: np.random.Generator) -> Iterator[Ternary]:
    for i, kind in enumerate(KINDS):
        for j, k in enumerate(WIDTHS):
            m, n = ROWS[(i + 3 * j) % len(ROWS)], OUTPUTS[(5 * i + j) % len(OUTPUTS)]
            dtype = np.float16 if (i + j) % 4 == 0 else np.float32
            x = as_type(magnitudes(rng, m, k, kind), dtype)
            yield Ternary(x, ternary_weights(rng, n, k, kind), workers=1 + (i + j) % 3)
    for m in (1, 2, 3, 7, 8, 16, 33, 65):
        for dtype in (np.float32, np.float16):
            x = as_type(magnitudes(rng, m, 1024, "sparse"), dtype)
            x[:, rng.random(1024) < 0.5] = 0  # channels that no row uses
            yield Ternary(x, ternary_weights(rng, 513, 1024, "sparse"), workers=2)
    for m in (1, 4, 8):  # int16 sums at their limits, both signs
        for kind in ("one", "equal"):
            yield Ternary(magnitudes(rng, m, 2730, kind), ternary_weights(rng, 130, 2730, kind))
    for m in (1, 5):
        for workers in (1, 2, 3, 8):
            x = magnitudes(np.random.default_rng(5), m, 2730, "sparse")
            yield Ternary(x, ternary_weights(np.random.default_rng(6), 2730, 2730, "sparse"), workers=workers)


def sparse_cases(rng: np.random.Generator) -> Iterator[Sparse]:
    splits = ((), (0,), (130,), (128, 128, 128), (1, 127, 129), (64, 0, 200, 3), (256, 513), (2560, 640, 640))
    for i, kind in enumerate(KINDS):
        for j, width in enumerate((1, 31, 64, 129, 513)):
            m, split = ROWS[(i + 3 * j) % len(ROWS)], splits[(i + j) % len(splits)]
            x = as_type(magnitudes(rng, m, width, kind), np.float16 if (i + j) % 3 == 0 else np.float32)
            matrices = tuple(ternary_weights(rng, n, width, kind) for n in split)
            block = (0, 32, 0, 7)[(i + j) % 4]
            yield Sparse(x, matrices, (block or width) * (i % 4) // 3, block, 1 + j % 3)
    for m in (1, 2, 8, 9, 33):
        x = magnitudes(rng, m, 1024, "normal")
        matrices = tuple(ternary_weights(rng, n, 1024, "normal") for n in (640, 130, 130))
        for k in (300, 1024):
            yield Sparse(x, matrices, k, workers=2)


def all_cases(seed: int = 1) -> list[Case]:
    rng = np.random.default_rng(seed)
    return [*topk_cases(rng), *quantize_cases(rng), *ternary_cases(rng), *sparse_cases(rng)]


def some_cases(seed: int = 2) -> list[Case]:
    """Every sixth case, for emulation and sanitizers, and without the largest."""
    small = [case for case in all_cases(seed) if case.x.size < 50000]
    return small[::6] + [case for case in small if case.x.shape[1] in (1024, 2730)][::3]
