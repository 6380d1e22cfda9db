"""Runtimes: what compiles and runs a graph. One literal table, name -> "module:Class", resolved on use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
