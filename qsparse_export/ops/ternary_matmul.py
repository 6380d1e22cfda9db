"""TernaryMatMul: int8 activations (quantised inside) times packed ternary weights, ``y = Q(x) Qw(W)^T`` descaled.

Sources: The Era of 1-bit LLMs (BitNet b1.58, arXiv 2402.17764) and the BitNet b1.58 2B4T report (arXiv 2504.12285):
``Q(x) = clip(round(127 / gamma * x), -128, 127)`` with ``gamma = max(abs(x))`` per token, floored at 1e-5, round half
to even; ``Qw(W) = clip(round(W / alpha), -1, 1)``, ``alpha = mean(abs(W))``; the product is scaled by
``gamma / 127 * alpha``. The weights come packed (``qsparse_export.formats.ternary``), ``alpha`` as ``scale``.

Every implementation does the same float32 operations in the same order without contraction, so that results are
bit-equal: ``inv = 127 / gamma; q = clip(rint(inv * x)); y = float(sum q * w) * ((gamma / 127) * scale)``, then one
rounding to the type of x. The integer sum is exact. A row that holds NaN or Inf gives a row of NaN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qsparse_export.errors import UsageError
from qsparse_export.formats.ternary import row_bytes, unpack
from qsparse_export.ops.base import DOMAIN, VERSION, Op

if TYPE_CHECKING:
    import onnx

GAMMA_FLOOR = 1e-5
EXACT_FLOAT32_INPUTS = (1 << 24) // 128
"""Up to so many inputs a float32 sum of products of int8 and ternary values is exact in any order."""


def reference(x: np.ndarray, w: np.ndarray, scale: np.ndarray, n: int) -> np.ndarray:
    """The definition, row by row: x [..., K] float16 or float32, w uint8 [K, row_bytes(n)], scale float32 [1]."""
    weights = unpack(w, n).astype(np.int32)  # [N, K]
    rows = x.reshape(-1, x.shape[-1]).astype(np.float32)
    out = np.full((len(rows), n), np.nan, np.float32)
    for row, y in zip(rows, out, strict=True):
        if not np.isfinite(row).all():
            continue
        gamma = max(np.abs(row).max(), np.float32(GAMMA_FLOOR))
        q = np.clip(np.rint((np.float32(127) / gamma) * row), -128, 127).astype(np.int32)
        with np.errstate(over="ignore"):
            y[:] = (weights @ q).astype(np.float32) * ((gamma / np.float32(127)) * np.float32(scale[0]))
    with np.errstate(over="ignore"):
        return out.reshape(*x.shape[:-1], n).astype(x.dtype)


def unpacked(w: torch.Tensor, n: int) -> torch.Tensor:
    """uint8 [K, row_bytes(n)] to int8 [K, n], values -1, 0, 1."""
    codes = torch.stack([(w >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-1).view(torch.int8)
    return codes.flatten(1)[:, :n] - 1


def _check(x: torch.Tensor, w: torch.Tensor, scale: torch.Tensor, n: int) -> None:
    if not x.is_floating_point() or x.dim() == 0:
        raise UsageError(f"TernaryMatMul: x is {x.dtype} {list(x.shape)}; expected floating point [..., K]")
    if w.dtype != torch.uint8 or w.dim() != 2 or w.shape[0] != x.shape[-1] or w.shape[1] != row_bytes(n):
        raise UsageError(
            f"TernaryMatMul: w is {w.dtype} {list(w.shape)}; "
            f"expected uint8 [{x.shape[-1]}, {row_bytes(n)}] for {x.shape[-1]} inputs and {n} outputs"
        )
    if scale.dtype != torch.float32 or scale.shape != (1,):
        raise UsageError(f"TernaryMatMul: scale is {scale.dtype} {list(scale.shape)}; expected float32 [1]")


@torch.library.custom_op("qsparse::ternary_matmul", mutates_args=())
def ternary_matmul(x: torch.Tensor, w: torch.Tensor, scale: torch.Tensor, n: int) -> torch.Tensor:
    """x [..., K] floating, w uint8 [K, row_bytes(n)], scale float32 [1] to [..., n] in x's dtype.

    Raises UsageError on other shapes or dtypes. Differentiable in x (straight through the quantiser); weights and
    scale are constants of the deployed form and get no gradient.
    """
    _check(x, w, scale, n)
    wide = x.to(torch.float32)
    if not x.numel():
        return x.new_zeros(*x.shape[:-1], n)
    gamma = wide.abs().amax(-1, keepdim=True).clamp_min(GAMMA_FLOOR)
    inverse = torch.full_like(gamma, 127.0) / gamma
    q = (inverse * wide).round_().clamp_(-128, 127)
    exact = torch.float32 if x.shape[-1] <= EXACT_FLOAT32_INPUTS else torch.float64
    total = (q.nan_to_num_(0).to(exact) @ unpacked(w, n).to(exact)).to(torch.float32)
    y = total * ((gamma / 127.0) * scale)
    return torch.where(wide.isfinite().all(-1, keepdim=True), y, torch.nan).to(x.dtype)


@ternary_matmul.register_fake
def _(x: torch.Tensor, w: torch.Tensor, scale: torch.Tensor, n: int) -> torch.Tensor:
    _check(x, w, scale, n)
    return x.new_empty(*x.shape[:-1], n)


def _setup_context(
    ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor, int], output: torch.Tensor
) -> None:
    _, w, scale, ctx.n = inputs
    ctx.save_for_backward(w, scale)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
    w, scale = ctx.saved_tensors
    return grad @ (unpacked(w, ctx.n).to(grad.dtype) * scale.to(grad.dtype)).t(), None, None, None


ternary_matmul.register_autograd(_backward, setup_context=_setup_context)


def _translate(x: Any, w: Any, scale: Any, n: int) -> Any:
    import onnxscript

    return onnxscript.values.Opset(DOMAIN, VERSION).TernaryMatMul(x, w, scale, n=n)


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

    schema = OpSchema(
        "TernaryMatMul",
        DOMAIN,
        VERSION,
        doc=__doc__ or "",
        inputs=[
            OpSchema.FormalParameter("x", "T", "activations [..., K]"),
            OpSchema.FormalParameter("w", "tensor(uint8)", "2-bit weights [K, row_bytes(n)]"),
            OpSchema.FormalParameter("scale", "tensor(float)", "mean(abs(W)), [1]"),
        ],
        outputs=[OpSchema.FormalParameter("y", "T", "[..., n]")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)"], "float32 or float16")],
        attributes=[OpSchema.Attribute("n", OpSchema.AttrType.INT, "outputs, without padding", required=True)],
    )
    schema.set_type_and_shape_inference_function(infer)
    return schema


WEIGHTS_OF_BYTE = ", ".join(str((byte >> shift & 3) - 1) for byte in range(256) for shift in (0, 2, 4, 6))
"""int8 [256, 4] in ONNX text: the four weights of each byte, lowest bits first (code 3 never occurs)."""


# A constant w folds to its int8 [K, N] form when a session is made. MatMulInteger is fastest with uint8 activations
# (zero point 128) and int8 weights; 255 * 1 * 2 also stays inside the int16 sums of AVX2's vpmaddubsw. The Where
# between the two Muls also keeps ONNX Runtime 1.32 from fusing MatMulIntegerToFloat, which multiplies in another order.
# The last Reshape changes nothing: it keeps the declared shape of y while n is not yet folded into the shapes before it,
# since shape inference of Attention (onnx 1.23, 3-D inputs) takes a value width that is unknown for 0 and fails.
BODY = f"""
<domain: "ai.qsparse", opset_import: ["" : 23]>
TernaryMatMul <n> (x, w, scale) => (y)
{{
  first = Constant <value = int64[1] {{0}}> ()
  one = Constant <value = int64[1] {{1}}> ()
  last_axis = Constant <value = int64[1] {{-1}}> ()
  keep_then_rest = Constant <value = int64[2] {{0, -1}}> ()
  n_attribute = Constant <value_int: int = @n> ()
  outputs = Reshape (n_attribute, one)
  zero = Constant <value = float {{0.0}}> ()
  nan = Constant <value = float {{nan}}> ()
  largest = Constant <value = float {{3.4028234663852886e38}}> ()
  gamma_floor = Constant <value = float {{1e-5}}> ()
  q_min = Constant <value = float {{-128.0}}> ()
  q_max = Constant <value = float {{127.0}}> ()
  offset = Constant <value = float {{128.0}}> ()
  zero_point = Constant <value = uint8 {{128}}> ()
  weights_of_byte = Constant <value = int8[256, 4] {{{WEIGHTS_OF_BYTE}}}> ()

  bytes = Cast <to = 6> (w)
  by_byte = Gather <axis = 0> (weights_of_byte, bytes)
  padded_weights = Reshape (by_byte, keep_then_rest)
  weights = Slice (padded_weights, first, outputs, last_axis)

  wide = Cast <to = 1> (x)
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
  descale = Mul (gamma_over_127, scale)
  finite_byte = Cast <to = 2> (finite)
  finite_row_byte = ReduceMin <keepdims = 1> (finite_byte, last_axis)
  finite_row = Cast <to = 9> (finite_row_byte)
  descale_or_nan = Where (finite_row, descale, nan)
  result = Mul (total_float, descale_or_nan)
  typed = CastLike (result, x)
  lead = Shape <end = -1> (x)
  result_shape = Concat <axis = 0> (lead, outputs)
  y = Reshape <allowzero = 1> (typed, result_shape)
}}
"""

OP = Op("TernaryMatMul", torch.ops.qsparse.ternary_matmul.default, _translate, _schema, BODY, reference)
