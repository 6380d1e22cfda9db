"""What a test has shown of an op on a backend: a property of the test's report, from which docs/backends.md is made."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import numpy as np

PROPERTY = "evidence"
EXECUTED, EMULATED, LAUNCHED, COMPILED = "executed", "emulated", "launched", "compiled"
OP_NAMES = {
    "topk": "TopKSparsify",
    "quantize": "quantiser",
    "ternary": "TernaryMatMul",
    "sparse_ternary": "SparseTernaryMatMul",
    "sparse_matmul": "SparseMatMul, SparseMatMulNBits",
    "dense_matmul": "DenseMatMulNBits",
    "gather": "GatherNBits",
    "cached_attention": "CachedAttention",
    "gated_activation": "GatedActivation",
    "add_rms_norm": "AddRmsNorm",
}
"""The ops by the names of their cases in tests/kernels."""
STANDARD_NORM, STANDARD_HEAD = "RMSNormalization (standard op)", "MatMul of the head (standard op)"
"""What is no op of ours, and TVM has kernels of ours for."""
WHOLE_MODELS = "whole models"
"""In place of an op."""


@dataclass(frozen=True)
class Evidence:
    """``op`` (or several, "A, B") passed on ``backend`` as ``code`` (instruction set or architecture).

    ``how``: executed here, emulated (``by`` what), launched (every node of a graph, on a stand-in that computes nothing),
    or compiled only. ``error_share``: the largest error, as a share of what the op's definition allows.
    """

    op: str
    backend: str
    code: str
    how: str
    by: str = ""
    error_share: float | None = None


def share_within(found: np.ndarray, expected: np.ndarray, rtol: float, atol: float = 0.0, name: str = "") -> float:
    """Asserts what ``assert_allclose`` does; the largest error, as a share of what it allows."""
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol, err_msg=name)
    finite = np.isfinite(expected)
    truth = expected[finite].astype(np.float64)
    return largest_share(np.abs(found[finite] - truth), atol + rtol * np.abs(truth))


def largest_share(error: np.ndarray, allowed: np.ndarray) -> float:
    """Asserts that no error is larger than what is allowed; the largest, as a share of it."""
    assert (error <= allowed).all()
    return float(np.max(error / np.where(allowed > 0, allowed, 1), initial=0.0))


Record = Callable[[Evidence], None]


def recorder(record_property: Callable[[str, object], None]) -> Record:
    """Writes evidence into the report of the running test, an entry for each op."""

    def record(found: Evidence) -> None:
        for op in found.op.split(", "):
            record_property(PROPERTY, json.dumps(asdict(replace(found, op=op))))

    return record
