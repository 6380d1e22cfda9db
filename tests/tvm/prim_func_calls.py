"""PrimFuncs compiled for this machine and called with NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import tvm

from qsparse_export.runtimes.tvm.lanes import AVX2, AVX512_VNNI, GENERIC, Lanes
from qsparse_export.targets.detect import host

_NEEDS = {GENERIC: set(), AVX2: {"avx2"}, AVX512_VNNI: {"avx512_vnni", "avx512vl", "avx2", "fma"}}
LANES: tuple[Lanes, ...] = tuple(lanes for lanes, needs in _NEEDS.items() if needs <= host().features)
"""What this machine runs. Others run under an emulator: test_arm.py."""
_PROCESSORS: dict[str, dict[str, Any]] = {
    "generic": {"mcpu": "x86-64" if host().arch == "x86_64" else "generic"},
    "avx2": {"mcpu": "x86-64-v3"},
    "avx512vnni": {"mcpu": "x86-64-v4", "mattr": ["+avx512vnni"]},
}


@cache
def compiled(function: Callable[..., Any], lanes: Lanes, **static: Any) -> Callable[..., None]:
    """``function(lanes, **static)`` as a function of tensors."""
    prim_func = function(lanes, **static)
    target = tvm.target.Target({"kind": "llvm", **_PROCESSORS[lanes.name]})
    module = tvm.compile(tvm.IRModule({"kernel": prim_func.with_attr("global_symbol", "kernel")}), target=target)
    return module["kernel"]


def call(function: Callable[..., None], inputs: tuple[np.ndarray, ...], shape: tuple[int, ...]) -> np.ndarray:
    """The float32 result of ``shape`` that the function writes after its ``inputs``; NaN where it writes nothing."""
    y = tvm.runtime.tensor(np.full(shape, np.nan, np.float32))
    function(*(tvm.runtime.tensor(np.ascontiguousarray(array)) for array in inputs), y)
    return y.numpy()
