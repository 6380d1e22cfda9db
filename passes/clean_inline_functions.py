"""Puts the bodies of a model's own functions in the place of their calls: rules see one flat graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from qsparse_export.passes.base import Pass, PassResult

DOMAIN = "ai.qsparse"


@dataclass(frozen=True)
class InlineFunctions(Pass):
    """Inlines every model-local function but those of our own ops, which stay whole.

    Before: ``y = pkg.gelu(x)`` and a function ``pkg.gelu``. After: the nodes of its body, no function.
    """

    name: ClassVar[str] = "inline-functions"

    def call(self, model: ir.Model) -> PassResult:
        """See :class:`Pass`."""
        if all(function.domain == DOMAIN for function in model.functions.values()):
            return PassResult(model, False)
        InlinePass(criteria=lambda function: function.domain != DOMAIN)(model)
        return PassResult(model, True)
