"""SparseTernaryMatMul: top-k, int8 quantisation and the ternary matrices that share the mask, in one node.

``y = [TernaryMatMul(TopKSparsify(x), w_i, scale_i) for each matrix i]``, joined along the outputs: the semantics, sources
and formulas are those of :mod:`~qsparse_export.ops.topk_sparsify` and :mod:`~qsparse_export.ops.ternary_matmul`, and so
are the bits of the result. ``k`` = K with ``block`` = 0 selects nothing: then only natural zeros are skipped.

There is no torch op: no PyTorch module computes this, a pass makes it of the ops that one does compute.

The packed weights stand side by side: row c of ``w`` is input channel c of matrix 0, then of matrix 1, and so on, each
padded to 128 outputs (``formats.ternary``), so that w is its matrices' packed forms concatenated along the last axis.
``y`` is one long row without padding; a Split behind the node takes it apart (docs/adr/fused-matrices-are-one-row.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qsparse_export.errors import UsageError
from qsparse_export.formats.ternary import row_bytes
from qsparse_export.ops import ternary_matmul, topk_sparsify
from qsparse_export.ops.base import DOMAIN, VERSION, Op

if TYPE_CHECKING:
    import onnx


def reference(
    x: np.ndarray, w: np.ndarray, scales: np.ndarray, k: int, block: int, rescale: str, n: Sequence[int]
) -> np.ndarray:
    """The definition: x [..., K] float16 or float32, w uint8 [K, sum of row_bytes(n)], scales float32 [len(n)].

    Returns [..., sum(n)] in the dtype of x. UsageError when the operands do not fit each other.
    """
    widths = [row_bytes(outputs) for outputs in n]
    if w.shape != (x.shape[-1], sum(widths)) or scales.shape != (len(n),):
        raise UsageError(
            f"SparseTernaryMatMul: w is {list(w.shape)} and scales {list(scales.shape)}; expected "
            f"[{x.shape[-1]}, {sum(widths)}] and [{len(n)}] for {x.shape[-1]} inputs and outputs {list(n)}"
        )
    masked = topk_sparsify.reference(x, k, block, rescale)
    ends = np.cumsum(widths)
    parts = [
        ternary_matmul.reference(masked, w[:, end - width : end], scales[i : i + 1], outputs)
        for i, (outputs, width, end) in enumerate(zip(n, widths, ends, strict=True))
    ]
    return np.concatenate(parts, axis=-1) if parts else np.zeros((*x.shape[:-1], 0), x.dtype)


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

    schema = OpSchema(
        "SparseTernaryMatMul",
        DOMAIN,
        VERSION,
        doc=__doc__ or "",
        inputs=[
            OpSchema.FormalParameter("x", "T", "activations [..., K]"),
            OpSchema.FormalParameter("w", "tensor(uint8)", "2-bit weights [K, sum of row_bytes(n)]"),
            OpSchema.FormalParameter("scales", "tensor(float)", "mean(abs(W)) of each matrix, [len(n)]"),
        ],
        outputs=[OpSchema.FormalParameter("y", "T", "[..., sum(n)]")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)"], "float32 or float16")],
        attributes=[
            OpSchema.Attribute("k", OpSchema.AttrType.INT, "channels kept per row or block", required=True),
            OpSchema.Attribute("block", OpSchema.AttrType.INT, "channels that compete, 0: whole row", required=True),
            OpSchema.Attribute("rescale", OpSchema.AttrType.STRING, "none or l2", required=True),
            OpSchema.Attribute("n", OpSchema.AttrType.INTS, "outputs of each matrix, without padding", required=True),
        ],
    )
    schema.set_type_and_shape_inference_function(infer)
    return schema


# Output j of the joined rows belongs to the matrix whose number is the count of matrices that end at or before j; the
# padding of those lies before its column. All of that is constant and folds. The function of TopKSparsify is called as
# it is: a runtime with its kernel but without this one's still runs it native.
BODY = f"""
<domain: "ai.qsparse", opset_import: ["" : 23, "ai.qsparse" : 1]>
SparseTernaryMatMul <k, block, rescale, n> (x, w, scales) => (y)
{{
  first = Constant <value = int64[1] {{0}}> ()
  last_axis = Constant <value = int64[1] {{-1}}> ()
  keep_then_rest = Constant <value = int64[2] {{0, -1}}> ()
  as_column = Constant <value = int64[2] {{-1, 1}}> ()
  zero_index = Constant <value = int64 {{0}}> ()
  one_index = Constant <value = int64 {{1}}> ()
  tile = Constant <value = int64 {{128}}> ()
  outputs = Constant <value_ints: ints = @n> ()
  zero = Constant <value = float {{0.0}}> ()
  nan = Constant <value = float {{nan}}> ()
  largest = Constant <value = float {{3.4028234663852886e38}}> ()
  gamma_floor = Constant <value = float {{1e-5}}> ()
  q_min = Constant <value = float {{-128.0}}> ()
  q_max = Constant <value = float {{127.0}}> ()
  offset = Constant <value = float {{128.0}}> ()
  zero_point = Constant <value = uint8 {{128}}> ()
  weights_of_byte = Constant <value = int8[256, 4] {{{ternary_matmul.WEIGHTS_OF_BYTE}}}> ()

  ends = CumSum (outputs, zero_index)
  negative_outputs = Neg (outputs)
  padding = Mod (negative_outputs, tile)
  total_outputs = ReduceSum <keepdims = 1> (outputs)
  total_outputs_scalar = ReduceSum <keepdims = 0> (outputs)
  positions = Range (zero_index, total_outputs_scalar, one_index)
  position_column = Reshape (positions, as_column)
  is_after = GreaterOrEqual (position_column, ends)
  is_after_int = Cast <to = 7> (is_after)
  matrix = ReduceSum <keepdims = 0> (is_after_int, last_axis)
  padding_before_each = Mul (is_after_int, padding)
  padding_before = ReduceSum <keepdims = 0> (padding_before_each, last_axis)
  columns = Add (positions, padding_before)
  scale_of_output = Gather <axis = 0> (scales, matrix)

  bytes = Cast <to = 6> (w)
  by_byte = Gather <axis = 0> (weights_of_byte, bytes)
  padded_weights = Reshape (by_byte, keep_then_rest)
  weights = Gather <axis = 1> (padded_weights, columns)

  masked = ai.qsparse.TopKSparsify <k: int = @k, block: int = @block, rescale: string = @rescale> (x)
  wide = Cast <to = 1> (masked)
  absolute = Abs (wide)
  finite = LessOrEqual (absolute, largest)
  finite_magnitude = Where (finite, absolute, zero)
  finite_value = Where (finite, wide, zero)
  row_max = ReduceMax <keepdims = 1> (finite_magnitude, last_axis)
  gamma = Max (row_max, gamma_floor)
  inverse = Div (q_max, gamma)
  scaled = Mul (inverse, finite_value)
  rounded = Round (scaled)
  q = Clip (rounded, q_min, q_max)
  q_shifted = Add (q, offset)
  q_uint8 = Cast <to = 2> (q_shifted)
  total = MatMulInteger (q_uint8, weights, zero_point)
  total_float = Cast <to = 1> (total)
  gamma_over_127 = Div (gamma, q_max)
  descale = Mul (gamma_over_127, scale_of_output)
  finite_byte = Cast <to = 2> (finite)
  finite_row_byte = ReduceMin <keepdims = 1> (finite_byte, last_axis)
  finite_row = Cast <to = 9> (finite_row_byte)
  descale_or_nan = Where (finite_row, descale, nan)
  result = Mul (total_float, descale_or_nan)
  typed = CastLike (result, x)
  lead = Shape <end = -1> (x)
  result_shape = Concat <axis = 0> (lead, total_outputs)
  y = Reshape <allowzero = 1> (typed, result_shape)
}}
"""

OP = Op("SparseTernaryMatMul", None, None, _schema, BODY, reference)
