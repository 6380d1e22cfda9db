"""Activations and sizes that the cases of all ops share: what models have, and what breaks kernels."""

from __future__ import annotations

import numpy as np

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
    "outlier",
    "nan",
    "inf",
    "nan and inf",
)
WIDTHS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300, 511, 513)
OUTPUTS = (0, 1, 3, 4, 5, 127, 128, 129, 255, 256, 257, 384, 513)
ROWS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 33)


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
    elif kind == "outlier":  # one channel so large that the others share few quantised values
        x[:, width // 2 :][:, :1] = 100
    elif kind in ("nan", "inf", "nan and inf"):
        if "nan" in kind:
            x[rng.random((rows, width)) < 0.1] = np.nan
        if "inf" in kind:
            x[rng.random((rows, width)) < 0.1] = -np.inf
    return x


def as_type(x: np.ndarray, dtype: type) -> np.ndarray:
    with np.errstate(over="ignore"):
        return x.astype(dtype)
