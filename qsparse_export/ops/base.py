"""What an operator is: one torch op, one ONNX schema, one ONNX function body, one NumPy reference, one name for all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import onnx
    import onnx_ir as ir

DOMAIN = "ai.qsparse"
VERSION = 1
BODY_OPSET = 23
"""Opset of the function bodies; a function's opset must equal its model's."""


@dataclass(frozen=True)
class Op:
    """One operator of the domain ``ai.qsparse``.

    ``torch_op`` is the overload under ``torch.ops.qsparse`` and ``translate`` its ONNX translation (for
    ``torch.onnx.export(custom_translation_table=...)``), both None for an op that only a pass makes; ``schema`` builds
    the ONNX schema with its shape inference; ``body_text`` is the function body in ONNX's text form, the portable
    implementation; ``reference`` is the slow and obvious NumPy definition that judges all others; it gives one array, or a
    tuple where the op has several outputs.
    """

    name: str
    torch_op: Callable[..., Any] | None
    translate: Callable[..., Any] | None
    schema: Callable[[], onnx.defs.OpSchema]
    body_text: str
    reference: Callable[..., np.ndarray | tuple[np.ndarray, ...]]

    def body(self) -> ir.Function:
        """A fresh copy of the function body, of the same domain and name as the op."""
        import onnx.parser
        import onnx_ir as ir

        return ir.serde.deserialize_function(onnx.parser.parse_function(self.body_text))

    def register_schema(self) -> None:
        """Makes the op known to onnx (checker, shape inference, torch.onnx); calling it again changes nothing."""
        import onnx.defs

        if not onnx.defs.has(self.name, VERSION, DOMAIN):
            onnx.defs.register_schema(self.schema())
