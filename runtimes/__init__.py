"""Runtimes: what compiles and runs a graph. One literal table, name -> "module:Class", resolved on use."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from qsparse_export.runtimes.base import Runtime

RUNTIMES: dict[str, str] = {
    "ort": "ort.runtime:OrtRuntime",
    "reference": "reference.runtime:ReferenceRuntime",
    "tvm": "tvm.runtime:TvmRuntime",
}


def get_runtime(name: str) -> Runtime:
    """The runtime called ``name``; UsageError with near names when there is none."""
    from qsparse_export.errors import UsageError, near_names

    if name not in RUNTIMES:
        raise UsageError(f"unknown runtime {name!r}; {near_names(name, RUNTIMES)}")
    module, _, cls = RUNTIMES[name].partition(":")
    return getattr(importlib.import_module(f"qsparse_export.runtimes.{module}"), cls)()


def require_gpu(path: Path) -> None:
    """Raises TargetError, about the bundle at ``path``, when the installed ONNX Runtime is one without a CUDA provider."""
    from qsparse_export.runtimes.ort.runtime import require_cuda_provider

    require_cuda_provider(path)


def gpu_runtime(target: Mapping[str, Any]) -> Runtime:
    """ONNX Runtime on the GPU of this machine, with the library for ``target`` of a manifest.

    TargetError when the library is not in the cache and nvcc is not here to build it.
    """
    from qsparse_export.runtimes.ort import cuda_build
    from qsparse_export.runtimes.ort.runtime import OrtRuntime

    return OrtRuntime(library=cuda_build.build(target["name"], target["triple"], target["features"]), on_gpu=True)
