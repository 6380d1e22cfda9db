"""DenseMatMulNBits: a 4- or 8-bit group-quantised matrix that is read whole, output by output: the language model head.

``y = x dequantize(w, scales)^T``. Nothing is skipped, so rows are outputs and lie in order (output-major,
``formats.nbits``); a tied embedding is the same two tensors, read by :mod:`~qsparse_export.ops.gather_nbits`.

Sums are float32 in no particular order, rounded once to the type of x. An implementation may differ from the exact sum
by the rounding of about K + 4 float32 operations on ``sum |x| (|code| + 2**(bits - 1)) scale``, and may round each
activation to 16 bits of the largest one of the 64 inputs around it (32 for 8 bits), by 1/65534 of that at most: the
native kernels do (docs/adr/sixteen-bit-activations.md). A row of x that holds NaN or Inf gives a row of NaN.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qsparse_export.errors import UsageError
from qsparse_export.formats import nbits
from qsparse_export.ops.base import DOMAIN, VERSION, Op
from qsparse_export.ops.kept_matrices import dequantized_once

if TYPE_CHECKING:
    import onnx

SLICE_ROWS = 8192
"""Rows dequantised at a time: a head of 128,256 x 2,560 would be 1.3 GB in float32."""


def check_operands(
    op: str, w_shape: tuple[int, ...], scales_shape: tuple[int, ...], n: int, k: int, bits: int, group: int
) -> None:
    """UsageError, beginning with ``op``, when output-major weights and scales are not those of an [n, k] matrix."""
    if bits not in nbits.BITS or group < 1:
        raise UsageError(f"{op}: {bits} bits in groups of {group}; expected 4 or 8 bits and a positive group")
    if group % nbits.WORDS and group < k:
        raise UsageError(f"{op}: groups of {group} of {k} inputs; expected a multiple of {nbits.WORDS}, or all inputs")
    expected = (n, nbits.output_row_bytes(k, bits)), (n, nbits.group_count(k, group))
    if (tuple(w_shape), tuple(scales_shape)) != expected:
        raise UsageError(
            f"{op}: w is {list(w_shape)} bytes and scales {list(scales_shape)}; expected {list(expected[0])} and "
            f"{list(expected[1])} for {n} outputs, {k} inputs of {bits} bits in groups of {group}"
        )


def reference(x: np.ndarray, w: np.ndarray, scales: np.ndarray, n: int, k: int, bits: int, group: int) -> np.ndarray:
    """The definition: x [..., k] float16 or float32, w uint8 [n, output_row_bytes(k)], scales float16 [n, groups].

    Returns [..., n] in the dtype of x, summed in float64. UsageError when the operands do not fit each other.
    """
    if x.shape[-1:] != (k,):
        raise UsageError(f"DenseMatMulNBits: x is {list(x.shape)}; expected {k} inputs in its last dimension")
    check_operands("DenseMatMulNBits", w.shape, scales.shape, n, k, bits, group)
    codes = nbits.unpack_outputs(w, k, bits)
    weights = codes * scales[:, np.arange(k) // group].astype(np.float64)
    rows = x.reshape(-1, k).astype(np.float64)
    finite = np.isfinite(rows)
    y = np.where(finite, rows, 0) @ weights.T
    y[~finite.all(axis=-1)] = np.nan
    with np.errstate(over="ignore"):
        return y.reshape(*x.shape[:-1], n).astype(np.float32).astype(x.dtype)


def dequantized_rows(w: torch.Tensor, scales: torch.Tensor, k: int, bits: int, group: int) -> torch.Tensor:
    """Output-major uint8 [..., output_row_bytes(k)] and float16 [..., groups] to float32 [..., k]."""
    codes = torch.stack((w & 15, w >> 4), dim=-1).flatten(-2)[..., :k] if bits == 4 else w
    signed = codes.to(torch.float32) - (1 << bits - 1)
    return signed * scales.to(torch.float32).repeat_interleave(group, dim=-1)[..., :k]


def _check(x: torch.Tensor, w: torch.Tensor, scales: torch.Tensor, n: int, bits: int, group: int) -> None:
    if not x.is_floating_point() or x.dim() == 0:
        raise UsageError(f"DenseMatMulNBits: x is {x.dtype} {list(x.shape)}; expected floating point [..., K]")
    check_types("DenseMatMulNBits", w, scales)
    check_operands("DenseMatMulNBits", tuple(w.shape), tuple(scales.shape), n, x.shape[-1], bits, group)


def check_types(op: str, w: torch.Tensor, scales: torch.Tensor) -> None:
    """UsageError, beginning with ``op``, unless w is uint8 and the scales are float16."""
    if w.dtype != torch.uint8 or scales.dtype != torch.float16:
        raise UsageError(f"{op}: w is {w.dtype} and scales are {scales.dtype}; expected uint8 and float16")


@torch.library.custom_op("qsparse::dense_matmul_nbits", mutates_args=())
def dense_matmul_nbits(
    x: torch.Tensor, w: torch.Tensor, scales: torch.Tensor, n: int, bits: int, group: int
) -> torch.Tensor:
    """x [..., K] floating, w uint8 [n, output_row_bytes(K)], scales float16 [n, groups] to [..., n] in x's dtype.

    Raises UsageError on other shapes or dtypes. Differentiable in x; weights and scales get no gradient.
    """
    _check(x, w, scales, n, bits, group)
    wide = x.to(torch.float32)
    finite = wide.isfinite()
    clean = torch.where(finite, wide, 0)
    y = wide.new_empty(*x.shape[:-1], n)
    for rows in _slices(n):
        part, scale = w[rows], scales[rows]
        weights = dequantized_once(part, partial(dequantized_rows, part, scale, x.shape[-1], bits, group))
        y[..., rows] = clean @ weights.t()
    return torch.where(finite.all(-1, keepdim=True), y, torch.nan).to(x.dtype)


def _slices(n: int) -> list[slice]:
    return [slice(begin, begin + SLICE_ROWS) for begin in range(0, n, SLICE_ROWS)]


@dense_matmul_nbits.register_fake
def _(x: torch.Tensor, w: torch.Tensor, scales: torch.Tensor, n: int, bits: int, group: int) -> torch.Tensor:
    _check(x, w, scales, n, bits, group)
    return x.new_empty(*x.shape[:-1], n)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, w, scales, _, ctx.bits, ctx.group = inputs
    ctx.k = x.shape[-1]
    ctx.save_for_backward(w, scales)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None, None]:
    w, scales = ctx.saved_tensors
    wide = grad.to(torch.float32)
    total = wide.new_zeros(*grad.shape[:-1], ctx.k)
    for rows in _slices(len(w)):
        total = total + wide[..., rows] @ dequantized_rows(w[rows], scales[rows], ctx.k, ctx.bits, ctx.group)
    return total.to(grad.dtype), None, None, None, None, None


dense_matmul_nbits.register_autograd(_backward, setup_context=_setup_context)


def _translate(x: Any, w: Any, scales: Any, n: int, bits: int, group: int) -> Any:
    import onnxscript

    return onnxscript.values.Opset(DOMAIN, VERSION).DenseMatMulNBits(
        x, w, scales, n=n, k=x.shape[-1], bits=bits, group=group
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
            dims.add().dim_value = context.get_attribute("n").i
        context.set_output_type(0, result)

    integer = OpSchema.AttrType.INT
    schema = OpSchema(
        "DenseMatMulNBits",
        DOMAIN,
        VERSION,
        doc=__doc__ or "",
        inputs=[
            OpSchema.FormalParameter("x", "T", "activations [..., k]"),
            OpSchema.FormalParameter("w", "tensor(uint8)", "codes [n, output_row_bytes(k)]"),
            OpSchema.FormalParameter("scales", "tensor(float16)", "[n, groups]"),
        ],
        outputs=[OpSchema.FormalParameter("y", "T", "[..., n]")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)"], "float32 or float16")],
        attributes=[
            OpSchema.Attribute("n", integer, "outputs", required=True),
            OpSchema.Attribute("k", integer, "inputs", required=True),
            OpSchema.Attribute("bits", integer, "4 or 8", required=True),
            OpSchema.Attribute("group", integer, "input channels that share a scale", required=True),
        ],
    )
    schema.set_type_and_shape_inference_function(infer)
    return schema


# Unpacking and transposing fold, the condition too, and its branch is inlined; the branch not taken is checked all the
# same, hence the padding there. DequantizeLinear along axis 0 and MatMul become ONNX Runtime's MatMulNBits (see
# SparseMatMulNBits) of 4 bits, also for 8-bit weights, which are two planes of four: ONNX Runtime 1.32's 8-bit one with
# activations in float32 dequantises the whole matrix at every call, ten times slower. Sum and not Add, which it would
# fuse with one of the products to a Gemm of dequantised weights.
BODY = """
<domain: "ai.qsparse", opset_import: ["" : 23]>
DenseMatMulNBits <n, k, bits, group> (x, w, scales) => (y)
{
  last_axis = Constant <value = int64[1] {-1}> ()
  first = Constant <value = int64[1] {0}> ()
  one = Constant <value = int64[1] {1}> ()
  flat = Constant <value = int64[2] {0, -1}> ()
  four_index = Constant <value = int64 {4}> ()
  code_bits = Constant <value_int: int = @bits> ()
  width = Constant <value_int: int = @k> ()
  width_axis = Reshape (width, one)
  four = Constant <value = uint8 {4}> ()
  fifteen = Constant <value = uint8 {15}> ()
  eight_byte = Constant <value = uint8 {8}> ()
  zero_byte = Constant <value = uint8 {0}> ()
  sixteen = Constant <value = float {16.0}> ()
  zero = Constant <value = float {0.0}> ()
  nan = Constant <value = float {nan}> ()
  largest = Constant <value = float {3.4028234663852886e38}> ()

  wide_scales = Cast <to = 1> (scales)
  scales_t = Transpose <perm = [1, 0]> (wide_scales)
  scales_shape = Shape (scales_t)
  middle_bytes = Expand (eight_byte, scales_shape)
  middle = Cast <to = 21> (middle_bytes)
  low_bytes = BitwiseAnd (w, fifteen)
  high_bytes = BitShift <direction = "RIGHT"> (w, four)

  wide = Cast <to = 1> (x)
  absolute = Abs (wide)
  finite = LessOrEqual (absolute, largest)
  finite_value = Where (finite, wide, zero)
  is_4_bits = Equal (code_bits, four_index)
  product = If (is_4_bits) <
    then_branch = of_4_bits () => (product_of_4_bits)
    {
      low_column = Unsqueeze (low_bytes, last_axis)
      high_column = Unsqueeze (high_bytes, last_axis)
      pairs = Concat <axis = -1> (low_column, high_column)
      padded_codes = Reshape (pairs, flat)
      code_bytes = Slice (padded_codes, first, width_axis, last_axis)
      code_bytes_t = Transpose <perm = [1, 0]> (code_bytes)
      codes = Cast <to = 21> (code_bytes_t)
      weights = DequantizeLinear <axis = 0, block_size: int = @group> (codes, scales_t, middle)
      product_of_4_bits = MatMul (finite_value, weights)
    },
    else_branch = of_8_bits () => (product_of_8_bits)
    {
      none_bytes = Expand (zero_byte, scales_shape)
      none = Cast <to = 21> (none_bytes)
      row_bytes = Shape <start = -1> (w)
      missing = Sub (width_axis, row_bytes)
      pads = Concat <axis = 0> (first, missing)
      low_of_width = Pad <mode = "constant"> (low_bytes, pads, zero_byte, last_axis)
      high_of_width = Pad <mode = "constant"> (high_bytes, pads, zero_byte, last_axis)
      low_bytes_t = Transpose <perm = [1, 0]> (low_of_width)
      low_codes = Cast <to = 21> (low_bytes_t)
      low = DequantizeLinear <axis = 0, block_size: int = @group> (low_codes, scales_t, none)
      low_product = MatMul (finite_value, low)
      high_bytes_t = Transpose <perm = [1, 0]> (high_of_width)
      high_codes = Cast <to = 21> (high_bytes_t)
      high_scales = Mul (scales_t, sixteen)
      high = DequantizeLinear <axis = 0, block_size: int = @group> (high_codes, high_scales, middle)
      high_product = MatMul (finite_value, high)
      product_of_8_bits = Sum (low_product, high_product)
    }
  >
  finite_byte = Cast <to = 2> (finite)
  finite_row_byte = ReduceMin <keepdims = 1> (finite_byte, last_axis)
  finite_row = Cast <to = 9> (finite_row_byte)
  result = Where (finite_row, product, nan)
  y = CastLike (result, x)
}
"""

OP = Op("DenseMatMulNBits", torch.ops.qsparse.dense_matmul_nbits.default, _translate, _schema, BODY, reference)
