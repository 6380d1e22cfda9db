"""How much of the error that a definition allows a result uses."""

from __future__ import annotations

import numpy as np


def error_share(found: np.ndarray, expected: np.ndarray, allowed: np.ndarray | float, label: str = "") -> float:
    """The largest ``|found - expected| / allowed``; equal values, NaN and infinities among them, have none.

    AssertionError, with ``label``, where it is above 1.
    """
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    same = (found == expected) | (np.isnan(found) & np.isnan(expected))
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        share = np.where(same, 0.0, np.abs(found - expected) / allowed)
    assert (share <= 1).all(), f"{label}: {np.nanmax(share)} times the allowed error"
    return float(share.max(initial=0.0))
