"""What a test has shown of an op on a backend: a property of the test's report, from which docs/backends.md is made."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

PROPERTY = "evidence"
EXECUTED, EMULATED, COMPILED = "executed", "emulated", "compiled"
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


@dataclass(frozen=True)
class Evidence:
    """``op`` passed on ``backend`` as ``code`` (instruction set or architecture), ``how``: executed here, emulated (``by``
    what), or compiled only. ``error_share``: the largest error, as a share of what the op's definition allows.
    """

    op: str
    backend: str
    code: str
    how: str
    by: str = ""
    error_share: float | None = None


Record = Callable[[Evidence], None]


def recorder(record_property: Callable[[str, object], None]) -> Record:
    """Writes evidence into the report of the running test."""
    return lambda found: record_property(PROPERTY, json.dumps(asdict(found)))
