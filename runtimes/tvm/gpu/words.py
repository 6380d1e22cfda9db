"""Weights as the GPU kernels take them: the bytes of the file, as words where rows are made of whole ones."""

from __future__ import annotations

import numpy as np

from qsparse_export.runtimes.tvm.gpu.output_major import WORD_BYTES


def as_words(rows: np.ndarray) -> np.ndarray:
    """uint8 [..., bytes] as uint32 [..., words], or as it is where the last word would not be whole."""
    return rows if rows.shape[-1] % WORD_BYTES else np.ascontiguousarray(rows).view(np.uint32)
