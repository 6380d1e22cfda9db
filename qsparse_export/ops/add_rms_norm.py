"""AddRmsNorm: the residual sum and the RMS norm behind it, in one node with both as outputs.

``sum = x + residual`` in the tensors' type, ``y = sum / sqrt(mean(sum^2) + epsilon) * weight`` over the last dimension,
computed in float32 (RMSNorm, arXiv 1910.07467). ``sum`` is the first output: it is the residual stream, the value that a
decoder layer gives.

There is no torch op: no PyTorch module computes this, a pass makes it of Add and RMSNormalization.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from qsparse_export.errors import UsageError
from qsparse_export.ops.base import DOMAIN, VERSION, Op

if TYPE_CHECKING:
    import onnx


def reference(x: np.ndarray, residual: np.ndarray, weight: np.ndarray, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """The definition: x and residual [..., N], weight [N], all float16 or float32, to (sum, y) of the same type.

    UsageError when the shapes do not fit.
    """
    if x.shape != residual.shape or weight.shape != x.shape[-1:]:
        raise UsageError(
            f"AddRmsNorm: x {list(x.shape)}, residual {list(residual.shape)}, weight {list(weight.shape)}; expected "
            "[..., N] twice and [N]"
        )
    with np.errstate(all="ignore"):
        total = x + residual
        wide = total.astype(np.float32)
        mean = np.mean(wide.astype(np.float64) ** 2, axis=-1, keepdims=True)
        y = wide * (1 / np.sqrt(mean + epsilon)).astype(np.float32) * weight.astype(np.float32)
    return total, y.astype(x.dtype)


def _schema() -> onnx.defs.OpSchema:
    from onnx.defs import OpSchema

    def infer(context: Any) -> None:
        context.set_output_type(0, context.get_input_type(0))
        context.set_output_type(1, context.get_input_type(0))

    schema = OpSchema(
        "AddRmsNorm",
        DOMAIN,
        VERSION,
        doc=__doc__ or "",
        inputs=[
            OpSchema.FormalParameter("x", "T", "[..., N]"),
            OpSchema.FormalParameter("residual", "T", "[..., N]"),
            OpSchema.FormalParameter("weight", "T", "[N]"),
        ],
        outputs=[
            OpSchema.FormalParameter("sum", "T", "x + residual"),
            OpSchema.FormalParameter("y", "T", "the normalised sum"),
        ],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)"], "float32 or float16")],
        attributes=[OpSchema.Attribute("epsilon", OpSchema.AttrType.FLOAT, "added to the mean square", required=True)],
    )
    schema.set_type_and_shape_inference_function(infer)
    return schema


BODY = """
<domain: "ai.qsparse", opset_import: ["" : 23]>
AddRmsNorm <epsilon> (x, residual, weight) => (sum, y)
{
  sum = Add (x, residual)
  y = RMSNormalization <axis = -1, epsilon: float = @epsilon> (sum, weight)
}
"""

OP = Op("AddRmsNorm", None, None, _schema, BODY, reference)
