"""Stores equal weights once: an embedding and the head that is tied to it are one tensor in the file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import DeduplicateHashedInitializersPass

from qsparse_export.passes.base import Pass, PassResult


@dataclass(frozen=True)
class PackTied(Pass):
    """Initialisers of the same type, shape and content become one, found by their SHA-512.

    Before: ``embedding [V, H]`` and ``head [V, H]``, equal. After: ``embedding``, and the head's reader reads it.

    Reads every weight once. Our own exporter ties by construction and does not need it; other exporters copy.
    """

    name: ClassVar[str] = "pack-tied"

    def call(self, model: ir.Model) -> PassResult:
        """See :class:`Pass`."""
        return DeduplicateHashedInitializersPass(size_limit=1 << 62)(model)
