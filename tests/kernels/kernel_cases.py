"""The ops under test. Each has a module with its reference in NumPy, its case (what to call, what must come out) and

cases(rng)    every case that must be right on every variant, on any number of threads
LEAST_CASES   a lower bound of their number, so that a loop that yields nothing is noticed

A new op is such a module, a line here and a line in runner.cc; all builds, variants and sanitizers then run it. The
references are written for speed; tests/runtimes/ort compares the same library with the ops' own references.
"""

from __future__ import annotations

import add_rms_norm_cases
import cached_attention_cases
import dense_matmul_cases
import gated_activation_cases
import gather_cases
import numpy as np
import quantize_cases
import sparse_matmul_cases
import sparse_ternary_cases
import ternary_cases
import topk_cases
from kernel_call import Case

OPS = {
    "topk": topk_cases,
    "quantize": quantize_cases,
    "ternary": ternary_cases,
    "sparse_ternary": sparse_ternary_cases,
    "sparse_matmul": sparse_matmul_cases,
    "dense_matmul": dense_matmul_cases,
    "gather": gather_cases,
    "cached_attention": cached_attention_cases,
    "gated_activation": gated_activation_cases,
    "add_rms_norm": add_rms_norm_cases,
}

SMALL = 100_000
"""Elements of x that emulators and sanitizers can work through."""


def cases_of(op: str, seed: int = 1) -> list[Case]:
    """All cases of one op."""
    return list(OPS[op].cases(np.random.default_rng(seed)))


def threaded_cases_of(op: str, seed: int = 2) -> list[Case]:
    """The small cases of one op that ask for several threads."""
    return [case for case in cases_of(op, seed) if case.workers > 1 and case.x.size < SMALL]


def some_cases_of(op: str, seed: int = 2) -> list[Case]:
    """For emulation and sanitizers: a sixth of the small cases, and every other one that asks for threads."""
    return [case for case in cases_of(op, seed) if case.x.size < SMALL][::6] + threaded_cases_of(op, seed)[::2]


def some_cases() -> list[Case]:
    """Those of all ops."""
    return [case for op in OPS for case in some_cases_of(op)]
