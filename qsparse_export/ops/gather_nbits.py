"""GatherNBits: rows of a 4- or 8-bit group-quantised matrix, dequantised: the embedding of a model whose head is n-bit.

``y[i] = dequantize(w, scales)[ids[i]]``: code times scale in float32, which is exact. A model with float16 activations
casts behind it: ONNX Runtime tells the types of a custom op by its inputs alone. The weights are output-major
(``formats.nbits``), the very tensors of :mod:`~qsparse_export.ops.dense_matmul_nbits` where head and embedding are tied.
Ids must be at least 0 and below N; an implementation refuses others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qsparse_export.errors import UsageError
from qsparse_export.formats import nbits
from qsparse_export.ops.base import DOMAIN, VERSION, Op
from qsparse_export.ops.dense_matmul_nbits import check_operands, check_types, dequantized_rows

if TYPE_CHECKING:
    import onnx


def reference(ids: np.ndarray, w: np.ndarray, scales: np.ndarray, k: int, bits: int, group: int) -> np.ndarray:
    """The definition: ids int64 [...], w uint8 [N, output_row_bytes(k)], scales float16 [N, groups] to float32
    [..., k]. UsageError when operands do not fit each other or an id
    is outside 0..N-1.
    """
    check_operands("GatherNBits", w.shape, scales.shape, len(w), k, bits, group)
    if ids.size and (ids.min() < 0 or ids.max() >= len(w)):
        raise UsageError(f"GatherNBits: ids from {ids.min()} to {ids.max()}; expected 0 to {len(w) - 1}")
    rows = ids.reshape(-1)
    codes = nbits.unpack_outputs(w[rows], k, bits)
    values = codes * scales[rows][:, np.arange(k) // group].astype(np.float32)
    return values.reshape(*ids.shape, k)


def _check(ids: torch.Tensor, w: torch.Tensor, scales: torch.Tensor, k: int, bits: int, group: int) -> None:
    if ids.dtype != torch.int64 or w.dim() != 2:
        raise UsageError(
            f"GatherNBits: ids are {ids.dtype} and w is {list(w.shape)}; expected int64 and [N, bytes of a row]"
        )
    check_types("GatherNBits", w, scales)
    check_operands("GatherNBits", tuple(w.shape), tuple(scales.shape), w.shape[0], k, bits, group)


@torch.library.custom_op("qsparse::gather_nbits", mutates_args=())
def gather_nbits(
    ids: torch.Tensor, w: torch.Tensor, scales: torch.Tensor, k: int, bits: int, group: int
) -> torch.Tensor:
    """ids int64 [...], w uint8 [N, output_row_bytes(k)], scales float16 [N, groups] to float32 [..., k].

    Raises UsageError on other shapes or types, and for an id outside 0..N-1. Not differentiable.
    """
    _check(ids, w, scales, k, bits, group)
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < len(w):
        raise UsageError(f"GatherNBits: ids from {int(ids.min())} to {int(ids.max())}; expected 0 to {len(w) - 1}")
    return dequantized_rows(w[ids], scales[ids], k, bits, group)


@gather_nbits.register_fake
def _(ids: torch.Tensor, w: torch.Tensor, scales: torch.Tensor, k: int, bits: int, group: int) -> torch.Tensor:
    _check(ids, w, scales, k, bits, group)
    return scales.new_empty(*ids.shape, k, dtype=torch.float32)


def _translate(ids: Any, w: Any, scales: Any, k: int, bits: int, group: int) -> Any:
    import onnxscript

    return onnxscript.values.Opset(DOMAIN, VERSION).GatherNBits(ids, w, scales, k=k, bits=bits, group=group)


def _schema() -> onnx.defs.OpSchema:
    from onnx import TensorProto, TypeProto
    from onnx.defs import OpSchema

    def infer(context: Any) -> None:
        ids = context.get_input_type(0)
        result = TypeProto()
        result.tensor_type.elem_type = TensorProto.FLOAT
        if ids.tensor_type.HasField("shape"):
            dims = result.tensor_type.shape.dim
            dims.extend(ids.tensor_type.shape.dim)
            dims.add().dim_value = context.get_attribute("k").i
        context.set_output_type(0, result)

    integer = OpSchema.AttrType.INT
    schema = OpSchema(
        "GatherNBits",
        DOMAIN,
        VERSION,
        doc=__doc__ or "",
        inputs=[
            OpSchema.FormalParameter("ids", "tensor(int64)", "rows to take [...]"),
            OpSchema.FormalParameter("w", "tensor(uint8)", "codes [N, output_row_bytes(k)]"),
            OpSchema.FormalParameter("scales", "tensor(float16)", "[N, groups]"),
        ],
        outputs=[OpSchema.FormalParameter("y", "tensor(float)", "[..., k]")],
        type_constraints=[],
        attributes=[
            OpSchema.Attribute("k", integer, "width of a row", required=True),
            OpSchema.Attribute("bits", integer, "4 or 8", required=True),
            OpSchema.Attribute("group", integer, "channels that share a scale", required=True),
        ],
    )
    schema.set_type_and_shape_inference_function(infer)
    return schema


# Rows are taken while they are packed, so that no more than these is ever unpacked.
BODY = """
<domain: "ai.qsparse", opset_import: ["" : 23]>
GatherNBits <k, bits, group> (ids, w, scales) => (y)
{
  last_axis = Constant <value = int64[1] {-1}> ()
  first = Constant <value = int64[1] {0}> ()
  one = Constant <value = int64[1] {1}> ()
  zero_index = Constant <value = int64 {0}> ()
  one_index = Constant <value = int64 {1}> ()
  two_index = Constant <value = int64 {2}> ()
  byte_bits = Constant <value = int64 {8}> ()
  code_bits = Constant <value_int: int = @bits> ()
  width = Constant <value_int: int = @k> ()
  channels_per_group = Constant <value_int: int = @group> ()

  shifts_int = Range (zero_index, byte_bits, code_bits)
  shifts = Cast <to = 2> (shifts_int)
  code_count = Pow (two_index, code_bits)
  mask_int = Sub (code_count, one_index)
  mask = Cast <to = 2> (mask_int)
  half_int = Div (code_count, two_index)
  half = Cast <to = 1> (half_int)
  channels = Range (zero_index, width, one_index)
  group_of_channel = Div (channels, channels_per_group)
  width_axis = Reshape (width, one)

  rows = Gather <axis = 0> (w, ids)
  bytes = Unsqueeze (rows, last_axis)
  shifted = BitShift <direction = "RIGHT"> (bytes, shifts)
  codes_of_byte = BitwiseAnd (shifted, mask)
  lead = Shape (ids)
  codes_of_row = Size (shifts)
  row_bytes = Shape <start = -1> (w)
  padded_width = Mul (row_bytes, codes_of_row)
  padded_shape = Concat <axis = 0> (lead, padded_width)
  padded_codes = Reshape <allowzero = 1> (codes_of_byte, padded_shape)
  codes = Slice (padded_codes, first, width_axis, last_axis)
  unsigned = Cast <to = 1> (codes)
  signed = Sub (unsigned, half)

  scale_rows = Gather <axis = 0> (scales, ids)
  scale_of_channel = Gather <axis = -1> (scale_rows, group_of_channel)
  wide_scale = Cast <to = 1> (scale_of_channel)
  y = Mul (signed, wide_scale)
}
"""

OP = Op("GatherNBits", torch.ops.qsparse.gather_nbits.default, _translate, _schema, BODY, reference)
