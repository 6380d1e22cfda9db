"""PrimFuncs compiled for this machine and called with NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import tvm

from qsparse_export.runtimes.tvm.lanes import AVX2, GENERIC, Lanes
from qsparse_export.targets.detect import host

LANES: tuple[Lanes, ...] = (GENERIC, *((AVX2,) if "avx2" in host().features else ()))
"""What this machine runs. Others run under an emulator: test_arm.py."""
_PROCESSORS = {"generic": "x86-64" if host().arch == "x86_64" else "generic", "avx2": "x86-64-v3"}


@cache
def compiled(function: Callable[..., Any], lanes: Lanes, **static: Any) -> Callable[..., None]:
    """``function(lanes, **static)`` as a function of tensors."""
    prim_func = function(lanes, **static)
    target = tvm.target.Target({"kind": "llvm", "mcpu": _PROCESSORS[lanes.name]})
    module = tvm.compile(tvm.IRModule({"kernel": prim_func.with_attr("global_symbol", "kernel")}), target=target)
    return module["kernel"]


def call(function: Callable[..., None], inputs: tuple[np.ndarray, ...], shape: tuple[int, ...]) -> np.ndarray:
    """The float32 result of ``shape`` that the function writes after its ``inputs``; NaN where it writes nothing."""
    y = tvm.runtime.tensor(np.full(shape, np.nan, np.float32))
    function(*(tvm.runtime.tensor(np.ascontiguousarray(array)) for array in inputs), y)
    return y.numpy()
