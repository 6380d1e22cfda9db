"""Versions of the tools that shape a bundle, read from their package metadata without importing them."""

from __future__ import annotations

import platform
from importlib.metadata import version

_TOOLS = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")


def tool_versions() -> dict[str, str]:
    """Package name to installed version, and Python's own."""
    return {"python": platform.python_version()} | {name: version(name) for name in _TOOLS}
