"""Export Q-Sparse and BitNet models from PyTorch to self-checking ONNX bundles.

>>> import qsparse_export as qs
>>> model = qs.load("model.pt")
>>> bundle = qs.export(model, target="cpu", out="model-cpu")
>>> bundle.open(threads=2).generate([1, 2, 3], max_new_tokens=16).tokens
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qsparse_export.api import export
    from qsparse_export.bundle import Bundle
    from qsparse_export.errors import QSparseError
    from qsparse_export.loader import Model, load, save
    from qsparse_export.nn.sparsify import sparsify

__version__ = "0.1.0"
__all__ = ["Bundle", "Model", "QSparseError", "__version__", "export", "load", "save", "sparsify"]

_HOME = {
    "Bundle": "bundle",
    "Model": "loader",
    "QSparseError": "errors",
    "export": "api",
    "load": "loader",
    "save": "loader",
    "sparsify": "nn.sparsify",
}


def __getattr__(name: str) -> Any:
    """Imports on first use, so that ``import qsparse_export`` costs no torch and no onnx."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
