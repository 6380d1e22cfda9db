"""GatedActivation: the activation of a gated feed-forward block, on its two products side by side.

``x`` [..., 2N] holds the gate and then what it gates, as one fused product leaves them; ``y`` [..., N] is float32:

- ``relu2``: ``relu(gate)^2 * up`` (Q-Sparse, arXiv 2407.10969v3, and BitNet 2B4T). float16 holds no square of a gate above
  256, so the product is computed and given in float32 whatever x is: a norm, or the quantiser's scale, brings it back.
- ``silu``: ``gate * sigmoid(gate) * up`` (SwiGLU, arXiv 2002.05202).

There is no torch op: no PyTorch module computes this, a pass makes it of the ops that one does compute.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from qsparse_export.errors import UsageError
from qsparse_export.ops.base import DOMAIN, VERSION, Op

if TYPE_CHECKING:
    import onnx

ACTIVATIONS = ("relu2", "silu")


def reference(x: np.ndarray, activation: str) -> np.ndarray:
    """The definition: x [..., 2N] float16 or float32 to float32 [..., N]; UsageError for another activation or an odd row."""
    if activation not in ACTIVATIONS or x.ndim == 0 or x.shape[-1] % 2:
        raise UsageError(
            f"GatedActivation: activation {activation!r} on {list(x.shape)}; expected one of {', '.join(ACTIVATIONS)} "
            "on [..., 2 * N]"
        )
    gate, up = np.split(x.astype(np.float32), 2, axis=-1)
    with np.errstate(all="ignore"):
        if activation == "relu2":
            positive = np.where(gate < 0, np.float32(0), gate)
            return (positive * positive) * up
        wide = gate.astype(np.float64)
        power = np.exp(-np.abs(wide))
        sigmoid = np.where(wide < 0, power, 1) / (1 + power)
        return (wide * sigmoid).astype(np.float32) * up


def _schema() -> onnx.defs.OpSchema:
    from onnx import TensorProto, TypeProto
    from onnx.defs import OpSchema

    def infer(context: Any) -> None:
        given = context.get_input_type(0).tensor_type
        result = TypeProto()
        result.tensor_type.elem_type = TensorProto.FLOAT
        if given.HasField("shape"):
            *lead, row = given.shape.dim
            result.tensor_type.shape.dim.extend(lead)
            width = result.tensor_type.shape.dim.add()
            if row.dim_value:
                width.dim_value = row.dim_value // 2
        context.set_output_type(0, result)

    schema = OpSchema(
        "GatedActivation",
        DOMAIN,
        VERSION,
        doc=__doc__ or "",
        inputs=[OpSchema.FormalParameter("x", "T", "gate and up [..., 2N]")],
        outputs=[OpSchema.FormalParameter("y", "tensor(float)", "[..., N]")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)"], "float32 or float16")],
        attributes=[OpSchema.Attribute("activation", OpSchema.AttrType.STRING, "relu2 or silu", required=True)],
    )
    schema.set_type_and_shape_inference_function(infer)
    return schema


# The activation is a text, so a comparison of constants chooses: it folds. No Sigmoid: ONNX Runtime's is off by 1e-7, many
# times what is left of a large negative gate.
BODY = """
<domain: "ai.qsparse", opset_import: ["" : 23]>
GatedActivation <activation> (x) => (y)
{
  chosen = Constant <value_string: string = @activation> ()
  silu_text = Constant <value_string: string = "silu"> ()
  is_silu = Equal (chosen, silu_text)
  wide = Cast <to = 1> (x)
  gate, up = Split <axis = -1, num_outputs = 2> (wide)
  one = Constant <value = float {1.0}> ()
  negative = Neg (gate)
  power = Exp (negative)
  denominator = Add (one, power)
  sigmoid = Div (one, denominator)
  positive = Relu (gate)
  factor = Where (is_silu, sigmoid, positive)
  base = Where (is_silu, gate, positive)
  activated = Mul (base, factor)
  y = Mul (activated, up)
}
"""

OP = Op("GatedActivation", None, None, _schema, BODY, reference)
