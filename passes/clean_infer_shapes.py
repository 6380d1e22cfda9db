"""Writes the shape of every value into the graph: ONNX's shape inference with the schemas of our ops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from qsparse_export.passes.base import Pass, PassResult, weights_unread


@dataclass(frozen=True)
class InferShapes(Pass):
    """Shapes and types on every value, symbolic dimensions by name.

    Before: ``y = Relu(x)`` with ``y`` unknown. After: ``y: float32[batch, 4]``.
    """

    name: ClassVar[str] = "infer-shapes"

    def call(self, model: ir.Model) -> PassResult:
        """See :class:`Pass`."""
        from qsparse_export import ops

        ops.register()
        with weights_unread(model):
            return ShapeInferencePass(check_type=True, strict_mode=False, data_prop=True)(model)
