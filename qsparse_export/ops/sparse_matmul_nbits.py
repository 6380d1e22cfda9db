"""SparseMatMulNBits: top-k, then 4- or 8-bit group-quantised matrices that share the mask, in floating point.

``y = [(x * M) dequantize(w_i, scales_i) for each matrix i]``, joined along the outputs: weight-only quantisation, the
activations of a full-precision Q-Sparse model (arXiv 2407.10969v3, equation 1) stay as they are. ``M`` is the mask of
:mod:`~qsparse_export.ops.topk_sparsify`, ``rescale`` included; ``k`` = K with ``block`` = 0 selects nothing: then only
natural zeros are skipped. Weights and scales are channel-major (``formats.nbits``), those of the matrices side by side,
each padded to 64 outputs; ``y`` is one long row without padding.

Sums are float32 in no particular order, rounded once to the type of x. An implementation may differ from the exact sum
by the rounding of about K + 4 float32 operations on ``sum |x| (|code| + 2**(bits - 1)) scale``, and may round each
activation to 16 bits of the largest one of the same group, by 1/65534 of that at most: the native kernels do for single
rows (docs/adr/sixteen-bit-activations.md). A masked row that holds NaN or Inf gives a row of NaN.

The torch op is the product alone, ``x`` masked already: node and torch op are the same with ``k`` = K.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qsparse_export.errors import UsageError
from qsparse_export.formats import nbits
from qsparse_export.ops import topk_sparsify
from qsparse_export.ops.base import DOMAIN, VERSION, Op
from qsparse_export.ops.kept_matrices import dequantized_once

if TYPE_CHECKING:
    import onnx


def reference(
    x: np.ndarray,
    w: np.ndarray,
    scales: np.ndarray,
    k: int,
    block: int,
    rescale: str,
    n: Sequence[int],
    bits: int,
    group: int,
) -> np.ndarray:
    """The definition: x [..., K] float16 or float32, w int8 or int4 [K, sum of columns(n)] (4-bit ones also packed, two a
    byte), scales float16 [groups, sum of columns(n)]; float64 sums.

    Returns [..., sum(n)] in the dtype of x. UsageError when the operands do not fit each other.
    """
    packed = _packed(w, bits)
    widths = [nbits.columns(outputs) for outputs in n]
    inputs = x.shape[-1]
    expected = (inputs, sum(widths) * bits // 8), (nbits.group_count(inputs, group), sum(widths))
    if (packed.shape, scales.shape) != expected:
        raise UsageError(
            f"SparseMatMulNBits: w is {list(packed.shape)} bytes and scales {list(scales.shape)}; expected "
            f"{list(expected[0])} and {list(expected[1])} for {inputs} inputs in groups of {group}, outputs {list(n)}"
        )
    masked = topk_sparsify.reference(x, k, block, rescale).reshape(-1, inputs).astype(np.float64)
    group_of_input = np.arange(inputs) // group
    parts = []
    for outputs, end, width in zip(n, np.cumsum(widths), widths, strict=True):
        codes = nbits.unpack_channels(packed[:, (end - width) * bits // 8 : end * bits // 8], outputs, bits)
        weights = codes * scales[group_of_input, end - width : end][:, :outputs].T.astype(np.float64)  # [N, K]
        parts.append(np.where(np.isfinite(masked), masked, 0) @ weights.T)
    y = np.concatenate(parts, axis=-1) if parts else np.zeros((len(masked), 0))
    y[~np.isfinite(masked).all(axis=-1)] = np.nan
    with np.errstate(over="ignore"):
        return y.reshape(*x.shape[:-1], sum(n)).astype(np.float32).astype(x.dtype)


def _packed(w: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [K, bytes], whatever way the runtime hands over 4-bit values: packed, or an element of int4 each."""
    if bits == 8 or w.dtype == np.uint8:
        return w.view(np.uint8)
    codes = w.astype(np.int8).view(np.uint8) & 15
    return codes[:, 0::2] | codes[:, 1::2] << 4


def dequantized(w: torch.Tensor, scales: torch.Tensor, n: int, bits: int, group: int) -> torch.Tensor:
    """Channel-major uint8 [K, columns(n) * bits / 8] and float16 [groups, columns(n)] to float32 [K, n]."""
    codes = torch.stack((w & 15, w >> 4), dim=-1).flatten(1) if bits == 4 else w
    planes = 32 // bits
    by_word = codes.unflatten(1, (-1, nbits.WORDS, planes)).transpose(2, 3).flatten(1)  # in the order of the outputs
    half = 1 << bits - 1
    signed = (by_word ^ half).to(torch.float32) - half
    scale = scales.to(torch.float32).repeat_interleave(group, dim=0)[: len(w)]
    return (signed * scale)[:, :n]


def _check(x: torch.Tensor, w: torch.Tensor, scales: torch.Tensor, n: int, bits: int, group: int) -> None:
    if not x.is_floating_point() or x.dim() == 0:
        raise UsageError(f"SparseMatMulNBits: x is {x.dtype} {list(x.shape)}; expected floating point [..., K]")
    inputs, width = x.shape[-1], nbits.columns(n)
    if bits not in nbits.BITS or group < 1:
        raise UsageError(
            f"SparseMatMulNBits: {bits} bits in groups of {group}; expected 4 or 8 bits and a positive group"
        )
    if w.dtype != torch.uint8 or tuple(w.shape) != (inputs, width * bits // 8):
        raise UsageError(
            f"SparseMatMulNBits: w is {w.dtype} {list(w.shape)}; expected uint8 [{inputs}, {width * bits // 8}] "
            f"for {inputs} inputs and {n} outputs of {bits} bits"
        )
    groups = nbits.group_count(inputs, group)
    if scales.dtype != torch.float16 or tuple(scales.shape) != (groups, width):
        raise UsageError(
            f"SparseMatMulNBits: scales are {scales.dtype} {list(scales.shape)}; expected float16 [{groups}, {width}]"
        )


@torch.library.custom_op("qsparse::matmul_nbits", mutates_args=())
def matmul_nbits(x: torch.Tensor, w: torch.Tensor, scales: torch.Tensor, n: int, bits: int, group: int) -> torch.Tensor:
    """x [..., K] floating, w uint8 [K, columns(n) * bits / 8], scales float16 [groups, columns(n)] to [..., n] in x's dtype.

    Raises UsageError on other shapes or dtypes. Differentiable in x; weights and scales get no gradient.
    """
    _check(x, w, scales, n, bits, group)
    wide = x.to(torch.float32)
    finite = wide.isfinite()
    weights = dequantized_once(w, lambda: dequantized(w, scales, n, bits, group))
    y = torch.where(finite, wide, 0) @ weights
    return torch.where(finite.all(-1, keepdim=True), y, torch.nan).to(x.dtype)


@matmul_nbits.register_fake
def _(x: torch.Tensor, w: torch.Tensor, scales: torch.Tensor, n: int, bits: int, group: int) -> torch.Tensor:
    _check(x, w, scales, n, bits, group)
    return x.new_empty(*x.shape[:-1], n)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, w, scales, ctx.n, ctx.bits, ctx.group = inputs
    ctx.save_for_backward(w, scales)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None, None]:
    w, scales = ctx.saved_tensors
    weights = dequantized(w, scales, ctx.n, ctx.bits, ctx.group)
    return grad @ weights.t().to(grad.dtype), None, None, None, None, None


matmul_nbits.register_autograd(_backward, setup_context=_setup_context)


def _translate(x: Any, w: Any, scales: Any, n: int, bits: int, group: int) -> Any:
    import onnxscript

    return onnxscript.values.Opset(DOMAIN, VERSION).SparseMatMulNBits(
        x, w, scales, k=x.shape[-1], block=0, rescale="none", n=[n], bits=bits, group=group
    )


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
        "SparseMatMulNBits",
        DOMAIN,
        VERSION,
        doc=__doc__ or "",
        inputs=[
            OpSchema.FormalParameter("x", "T", "activations [..., K]"),
            OpSchema.FormalParameter("w", "W", "codes [K, sum of columns(n)]"),
            OpSchema.FormalParameter("scales", "tensor(float16)", "[groups, sum of columns(n)]"),
        ],
        outputs=[OpSchema.FormalParameter("y", "T", "[..., sum(n)]")],
        type_constraints=[
            ("T", ["tensor(float)", "tensor(float16)"], "float32 or float16"),
            # uint8: as torch.onnx leaves 4-bit weights, two a byte, until the exporter gives them their own type.
            ("W", ["tensor(int4)", "tensor(int8)", "tensor(uint8)"], "signed codes of 4 or 8 bits"),
        ],
        attributes=[
            OpSchema.Attribute("k", integer, "channels kept per row or block", required=True),
            OpSchema.Attribute("block", integer, "channels that compete, 0: whole row", required=True),
            OpSchema.Attribute("rescale", OpSchema.AttrType.STRING, "none or l2", required=True),
            OpSchema.Attribute("n", OpSchema.AttrType.INTS, "outputs of each matrix, without padding", required=True),
            OpSchema.Attribute("bits", integer, "4 or 8", required=True),
            OpSchema.Attribute("group", integer, "input channels that share a scale", required=True),
        ],
    )
    schema.set_type_and_shape_inference_function(infer)
    return schema


# The scales are brought into the order of the columns (a constant, which folds), the product back into that of the
# outputs: output q of the padded row stands in column q % 8 * planes + q / 8 of its 8 * planes. DequantizeLinear along
# axis 0 and MatMul become ONNX Runtime's MatMulNBits, which by default quantises the activations to int8 too; the session
# option session.qdq_matmulnbits_accuracy_level = 1 keeps them in float32. 8-bit weights are two planes of 4 bits, added by
# Sum, for the reasons that DenseMatMulNBits has.
BODY = """
<domain: "ai.qsparse", opset_import: ["" : 23, "ai.qsparse" : 1]>
SparseMatMulNBits <k, block, rescale, n, bits, group> (x, w, scales) => (y)
{
  zero_axis = Constant <value = int64[1] {0}> ()
  one = Constant <value = int64[1] {1}> ()
  minus_one = Constant <value = int64[1] {-1}> ()
  flat = Constant <value = int64[2] {0, -1}> ()
  as_column = Constant <value = int64[2] {-1, 1}> ()
  zero_index = Constant <value = int64 {0}> ()
  one_index = Constant <value = int64 {1}> ()
  tile = Constant <value = int64 {64}> ()
  words = Constant <value = int64 {8}> ()
  word_bits = Constant <value = int64 {32}> ()
  outputs = Constant <value_ints: ints = @n> ()
  code_bits = Constant <value_int: int = @bits> ()
  zero = Constant <value = float {0.0}> ()
  nan = Constant <value = float {nan}> ()
  largest = Constant <value = float {3.4028234663852886e38}> ()

  planes = Div (word_bits, code_bits)
  planes_axis = Reshape (planes, one)
  words_axis = Reshape (words, one)
  by_plane = Concat <axis = 0> (zero_axis, minus_one, planes_axis, words_axis)
  wide_scales = Cast <to = 1> (scales)
  scales_by_plane = Reshape (wide_scales, by_plane)
  scales_by_word = Transpose <perm = [0, 1, 3, 2]> (scales_by_plane)
  scales_of_columns = Reshape (scales_by_word, flat)

  ends = CumSum (outputs, zero_index)
  negative_outputs = Neg (outputs)
  padding = Mod (negative_outputs, tile)
  total_outputs = ReduceSum <keepdims = 0> (outputs)
  positions = Range (zero_index, total_outputs, one_index)
  position_column = Reshape (positions, as_column)
  is_after = GreaterOrEqual (position_column, ends)
  is_after_int = Cast <to = 7> (is_after)
  padding_before_each = Mul (is_after_int, padding)
  padding_before = ReduceSum <keepdims = 0> (padding_before_each, minus_one)
  padded_position = Add (positions, padding_before)
  unit = Mul (words, planes)
  unit_number = Div (padded_position, unit)
  unit_begin = Mul (unit_number, unit)
  within = Sub (padded_position, unit_begin)
  plane = Div (within, words)
  word = Mod (within, words)
  word_begin = Mul (word, planes)
  within_column = Add (word_begin, plane)
  columns = Add (unit_begin, within_column)

  masked = ai.qsparse.TopKSparsify <k: int = @k, block: int = @block, rescale: string = @rescale> (x)
  wide = Cast <to = 1> (masked)
  absolute = Abs (wide)
  finite = LessOrEqual (absolute, largest)
  finite_value = Where (finite, wide, zero)
  four_index = Constant <value = int64 {4}> ()
  is_4_bits = Equal (code_bits, four_index)
  product = If (is_4_bits) <
    then_branch = of_4_bits () => (product_of_4_bits)
    {
      weights = DequantizeLinear <axis = 0, block_size: int = @group> (w, scales_of_columns)
      product_of_4_bits = MatMul (finite_value, weights)
    },
    else_branch = of_8_bits () => (product_of_8_bits)
    {
      half = Constant <value = int32 {128}> ()
      four = Constant <value = uint8 {4}> ()
      fifteen = Constant <value = uint8 {15}> ()
      middle_byte = Constant <value = uint8 {8}> ()
      none_byte = Constant <value = uint8 {0}> ()
      sixteen = Constant <value = float {16.0}> ()
      scales_shape = Shape (scales_of_columns)
      wide_codes = Cast <to = 6> (w)
      unsigned_int = Add (wide_codes, half)
      unsigned = Cast <to = 2> (unsigned_int)
      low_bytes = BitwiseAnd (unsigned, fifteen)
      low_codes = Cast <to = 21> (low_bytes)
      none_bytes = Expand (none_byte, scales_shape)
      none = Cast <to = 21> (none_bytes)
      low = DequantizeLinear <axis = 0, block_size: int = @group> (low_codes, scales_of_columns, none)
      low_product = MatMul (finite_value, low)
      high_bytes = BitShift <direction = "RIGHT"> (unsigned, four)
      high_codes = Cast <to = 21> (high_bytes)
      middle_bytes = Expand (middle_byte, scales_shape)
      middle = Cast <to = 21> (middle_bytes)
      high_scales = Mul (scales_of_columns, sixteen)
      high = DequantizeLinear <axis = 0, block_size: int = @group> (high_codes, high_scales, middle)
      high_product = MatMul (finite_value, high)
      product_of_8_bits = Sum (low_product, high_product)
    }
  >
  product_of_outputs = Gather <axis = -1> (product, columns)
  finite_byte = Cast <to = 2> (finite)
  finite_row_byte = ReduceMin <keepdims = 1> (finite_byte, minus_one)
  finite_row = Cast <to = 9> (finite_row_byte)
  result = Where (finite_row, product_of_outputs, nan)
  typed = CastLike (result, x)
  lead = Shape <end = -1> (x)
  total_axis = Reshape (total_outputs, one)
  result_shape = Concat <axis = 0> (lead, total_axis)
  y = Reshape <allowzero = 1> (typed, result_shape)
}
"""

OP = Op("SparseMatMulNBits", torch.ops.qsparse.matmul_nbits.default, _translate, _schema, BODY, reference)
