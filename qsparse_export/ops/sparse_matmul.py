"""SparseMatMul: top-k, then float matrices that share the mask, in one node.

``y = (x * M) w``, where ``w`` holds the matrices side by side, row k being input channel k of all of them: what a
full-precision Q-Sparse layer computes (arXiv 2407.10969v3, equation 1). ``M`` is the mask of
:mod:`~qsparse_export.ops.topk_sparsify`, ``rescale`` included; ``k`` = K with ``block`` = 0 selects nothing: then only
natural zeros are skipped. ``n`` are the outputs of each matrix, which a Split behind the node takes apart.

Sums are float32 in no particular order, rounded once to the type of x: an implementation may differ from the exact sum
by the rounding of about K + 4 float32 operations on ``sum |x| |w|``. NaN and Inf follow IEEE arithmetic; w is finite.

There is no torch op: no PyTorch module computes this, a pass makes it of TopKSparsify and MatMul.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qsparse_export.errors import UsageError
from qsparse_export.ops import topk_sparsify
from qsparse_export.ops.base import DOMAIN, VERSION, Op

if TYPE_CHECKING:
    import onnx


def reference(x: np.ndarray, w: np.ndarray, k: int, block: int, rescale: str, n: Sequence[int]) -> np.ndarray:
    """The definition: x [..., K] float16 or float32, w of the same type [K, sum(n)]; float64 sums.

    Returns [..., sum(n)] in the dtype of x. UsageError when the operands do not fit each other.
    """
    if w.shape != (x.shape[-1], sum(n)) or w.dtype != x.dtype:
        raise UsageError(
            f"SparseMatMul: w is {w.dtype} {list(w.shape)}; expected {x.dtype} [{x.shape[-1]}, {sum(n)}] for "
            f"{x.shape[-1]} inputs and outputs {list(n)}"
        )
    masked = topk_sparsify.reference(x, k, block, rescale).astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        return (masked @ w.astype(np.float64)).astype(np.float32).astype(x.dtype)


def _schema() -> onnx.defs.OpSchema:
    from onnx import TypeProto
    from onnx.defs import OpSchema

    def infer(context: Any) -> None:
        given = context.get_input_type(0)
        result = TypeProto()
        result.tensor_type.elem_type = given.tensor_type.elem_type
        if given.tensor_type.HasField("shape"):
            dims = result.tensor_type.shape.dim
            dims.extend(given.tensor_type.shape.dim[:-1])
            dims.add().dim_value = sum(context.get_attribute("n").ints)
        context.set_output_type(0, result)

    integer = OpSchema.AttrType.INT
    schema = OpSchema(
        "SparseMatMul",
        DOMAIN,
        VERSION,
        doc=__doc__ or "",
        inputs=[
            OpSchema.FormalParameter("x", "T", "activations [..., K]"),
            OpSchema.FormalParameter("w", "T", "weights [K, sum(n)]"),
        ],
        outputs=[OpSchema.FormalParameter("y", "T", "[..., sum(n)]")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)"], "float32 or float16")],
        attributes=[
            OpSchema.Attribute("k", integer, "channels kept per row or block", required=True),
            OpSchema.Attribute("block", integer, "channels that compete, 0: whole row", required=True),
            OpSchema.Attribute("rescale", OpSchema.AttrType.STRING, "none or l2", required=True),
            OpSchema.Attribute("n", OpSchema.AttrType.INTS, "outputs of each matrix", required=True),
        ],
    )
    schema.set_type_and_shape_inference_function(infer)
    return schema


BODY = """
<domain: "ai.qsparse", opset_import: ["" : 23, "ai.qsparse" : 1]>
SparseMatMul <k, block, rescale, n> (x, w) => (y)
{
  masked = ai.qsparse.TopKSparsify <k: int = @k, block: int = @block, rescale: string = @rescale> (x)
  y = MatMul (masked, w)
}
"""

OP = Op("SparseMatMul", None, None, _schema, BODY, reference)
