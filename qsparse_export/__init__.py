"""Export Q-Sparse and BitNet models from PyTorch to self-checking ONNX bundles."""

from __future__ import annotations

__version__ = "0.1.0"
