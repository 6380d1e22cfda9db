"""TopKSparsify: keep the k largest magnitudes of each row, ``y = x * M`` with ``M = TopK(abs(x))``.

Source: Q-Sparse (arXiv 2407.10969v3), section 2.1, and Block Q-Sparse for ``block`` > 0. Backward is the paper's
straight-through estimator: the mask counts as identity, ``dL/dx = dL/d(x * M)``.

Exactly k channels per row (per block of ``block`` consecutive channels; a shorter last block of r channels keeps
min(k, r)); of equal magnitudes the lowest index wins. A NaN ranks as +inf and is passed on even where it is not
selected. What is not kept becomes 0 by selection, so that no inf * 0 appears. ``rescale = "l2"`` then divides by
max(L2 norm of the whole masked row, 1e-12). Everything is computed in float32 and rounded once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qsparse_export.errors import UsageError
from qsparse_export.ops.base import DOMAIN, VERSION, Op

if TYPE_CHECKING:
    import onnx

NORM_FLOOR = 1e-12


def check_attributes(k: int, block: int, rescale: str, dim: int | None = None) -> None:
    """UsageError when the attributes contradict each other or the row width ``dim`` (None: unknown)."""
    if rescale not in ("none", "l2"):
        raise UsageError(f"TopKSparsify: rescale is {rescale!r}; expected 'none' or 'l2'")
    if block < 0:
        raise UsageError(f"TopKSparsify: block is {block}; expected 0 (whole row) or a positive number of channels")
    width = block or dim
    if k < 0 or (width is not None and k > width):
        raise UsageError(f"TopKSparsify: k is {k}; expected 0 to {'the row width' if width is None else width}")


def reference(x: np.ndarray, k: int, block: int = 0, rescale: str = "none") -> np.ndarray:
    """The definition, channel by channel: x [..., K] float16 or float32 to the same shape and dtype."""
    dim = x.shape[-1]
    check_attributes(k, block, rescale, dim)
    rows = x.reshape(-1, dim).astype(np.float32)
    out = np.zeros_like(rows)
    for row, kept in zip(rows, out, strict=True):
        width = block or dim
        for start in range(0, dim, width):
            channels = range(start, min(start + width, dim))
            magnitude = {c: np.inf if np.isnan(row[c]) else abs(row[c]) for c in channels}
            for c in sorted(channels, key=lambda c: (-magnitude[c], c))[:k]:
                kept[c] = row[c]
        kept[np.isnan(row)] = np.nan
        if rescale == "l2":
            with np.errstate(over="ignore", invalid="ignore"):
                norm = np.sqrt(np.sum(kept * kept, dtype=np.float32))
                kept /= norm if np.isnan(norm) else max(norm, np.float32(NORM_FLOOR))
    return out.reshape(x.shape).astype(x.dtype)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def topk_mask(x: torch.Tensor, k: int, block: int = 0) -> torch.Tensor:
    """bool [..., K], True for the k largest magnitudes of each row or block (lowest index first) and for every NaN."""
    dim = x.shape[-1]
    nan = x.isnan()
    magnitude = x.abs().masked_fill(nan, torch.inf)
    padding = -dim % block if block else 0
    if padding:  # padded channels rank below all others and come last, so they are selected only when r < k
        magnitude = torch.nn.functional.pad(magnitude, (0, padding), value=-1.0)
    blocks = magnitude.reshape(*x.shape[:-1], -1, block) if block and x.numel() else magnitude
    if k == 0 or not x.numel():
        return nan
    kth = blocks.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above = blocks > kth
    tied = blocks == kth
    room = k - above.sum(-1, keepdim=True)
    selected = above | (tied & (tied.cumsum(-1) <= room))
    return selected.reshape(*x.shape[:-1], -1)[..., :dim] | nan


def _rescaled(masked: torch.Tensor) -> torch.Tensor:
    return masked / torch.linalg.vector_norm(masked, dim=-1, keepdim=True).clamp_min(NORM_FLOOR)


@torch.library.custom_op("qsparse::topk_sparsify", mutates_args=())
def topk_sparsify(x: torch.Tensor, k: int, block: int, rescale: str) -> torch.Tensor:
    """x [..., K] of any floating dtype to the same shape and dtype; see the module for the formula.

    Raises UsageError when k is outside 0..width or an attribute is unknown. Trainable (straight-through).
    """
    check_attributes(k, block, rescale, x.shape[-1])
    masked = torch.where(topk_mask(x, k, block), x, torch.zeros((), dtype=x.dtype, device=x.device))
    if rescale == "l2":
        masked = _rescaled(masked.to(_accumulator(x.dtype))).to(x.dtype)
    return masked


@topk_sparsify.register_fake
def _(x: torch.Tensor, k: int, block: int, rescale: str) -> torch.Tensor:
    check_attributes(k, block, rescale, x.shape[-1] if isinstance(x.shape[-1], int) else None)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[torch.Tensor, int, int, str], output: torch.Tensor) -> None:
    x, ctx.k, ctx.block, ctx.rescale = inputs
    if ctx.rescale == "l2":
        ctx.save_for_backward(x)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
    """Straight through the mask: the gradient at the masked row is handed, whole, to x."""
    if ctx.rescale == "l2":
        (x,) = ctx.saved_tensors
        wide = _accumulator(x.dtype)
        masked = torch.ops.qsparse.topk_sparsify(x, ctx.k, ctx.block, "none").to(wide)
        norm = torch.linalg.vector_norm(masked, dim=-1, keepdim=True)
        floored = norm.clamp_min(NORM_FLOOR)
        unit, incoming = masked / floored, grad.to(wide)
        radial = unit * (unit * incoming).sum(-1, keepdim=True)
        grad = ((incoming - torch.where(norm > NORM_FLOOR, radial, 0)) / floored).to(grad.dtype)
    return grad, None, None, None


topk_sparsify.register_autograd(_backward, setup_context=_setup_context)


def _translate(x: Any, k: int, block: int, rescale: str) -> Any:
    import onnxscript

    return onnxscript.values.Opset(DOMAIN, VERSION).TopKSparsify(x, k=k, block=block, rescale=rescale)


def _schema() -> onnx.defs.OpSchema:
    from onnx.defs import OpSchema

    def infer(context: Any) -> None:
        context.set_output_type(0, context.get_input_type(0))

    schema = OpSchema(
        "TopKSparsify",
        DOMAIN,
        VERSION,
        doc=__doc__ or "",
        inputs=[OpSchema.FormalParameter("x", "T", "activations [..., K]")],
        outputs=[OpSchema.FormalParameter("y", "T", "masked activations [..., K]")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)"], "float32 or float16")],
        attributes=[
            OpSchema.Attribute("k", OpSchema.AttrType.INT, "channels kept per row or block", required=True),
            OpSchema.Attribute("block", OpSchema.AttrType.INT, "channels that compete, 0: whole row", required=True),
            OpSchema.Attribute("rescale", OpSchema.AttrType.STRING, "none or l2", required=True),
        ],
    )
    schema.set_type_and_shape_inference_function(infer)
    return schema


# Both If conditions are constants once the attributes are known, so ONNX Runtime inlines the branch that is taken. The
# other branch is still checked with its constants, hence a count of 0 and a width of 1 there: legal for any row.
BODY = """
<domain: "ai.qsparse", opset_import: ["" : 23]>
TopKSparsify <k, block, rescale> (x) => (y)
{
  zero = Constant <value = float {0.0}> ()
  infinity = Constant <value = float {inf}> ()
  below_all = Constant <value = float {-1.0}> ()
  norm_floor = Constant <value = float {1e-12}> ()
  first = Constant <value = int64[1] {0}> ()
  one = Constant <value = int64[1] {1}> ()
  last_axis = Constant <value = int64[1] {-1}> ()
  k_attribute = Constant <value_int: int = @k> ()
  count = Reshape (k_attribute, one)
  block_attribute = Constant <value_int: int = @block> ()
  block_or_zero = Reshape (block_attribute, one)
  is_row = Equal (block_or_zero, first)
  row_count = Where (is_row, count, first)
  block_count = Where (is_row, first, count)
  width = Where (is_row, one, block_or_zero)
  rescale_attribute = Constant <value_string: string = @rescale> ()
  l2 = Constant <value_string = "l2"> ()
  is_l2 = Equal (rescale_attribute, l2)

  wide = Cast <to = 1> (x)
  nan = IsNaN (wide)
  absolute = Abs (wide)
  magnitude = Where (nan, infinity, absolute)

  selected = If (is_row) <
    then_branch = of_row () => (selected_of_row)
    {
      row_values, row_channels = TopK <axis = -1, largest = 1, sorted = 0> (magnitude, row_count)
      row_kept_shape = Shape (row_channels)
      row_kept = ConstantOfShape <value = bool[1] {1}> (row_kept_shape)
      row_shape = Shape (magnitude)
      row_dropped = ConstantOfShape <value = bool[1] {0}> (row_shape)
      selected_of_row = ScatterElements <axis = -1, reduction = "none"> (row_dropped, row_channels, row_kept)
    },
    else_branch = of_blocks () => (selected_of_blocks)
    {
      lead = Shape <end = -1> (x)
      dim = Shape <start = -1> (x)
      negative_dim = Neg (dim)
      padding = Mod (negative_dim, width)
      pads = Concat <axis = 0> (first, padding)
      padded = Pad <mode = "constant"> (magnitude, pads, below_all, last_axis)
      padded_dim = Add (dim, padding)
      blocks_per_row = Div (padded_dim, width)
      block_shape = Concat <axis = 0> (lead, blocks_per_row, width)
      blocks = Reshape <allowzero = 1> (padded, block_shape)

      values, channels = TopK <axis = -1, largest = 1, sorted = 0> (blocks, block_count)
      kept_shape = Shape (channels)
      kept = ConstantOfShape <value = bool[1] {1}> (kept_shape)
      dropped = ConstantOfShape <value = bool[1] {0}> (block_shape)
      kept_of_block = ScatterElements <axis = -1, reduction = "none"> (dropped, channels, kept)

      padded_shape = Concat <axis = 0> (lead, padded_dim)
      kept_of_padded = Reshape <allowzero = 1> (kept_of_block, padded_shape)
      selected_of_blocks = Slice (kept_of_padded, first, dim, last_axis)
    }
  >
  mask = Or (selected, nan)
  masked = Where (mask, wide, zero)

  result = If (is_l2) <
    then_branch = rescaled () => (rescaled_row)
    {
      squares = Mul (masked, masked)
      sum_of_squares = ReduceSum <keepdims = 1> (squares, last_axis)
      norm = Sqrt (sum_of_squares)
      floored = Max (norm, norm_floor)
      rescaled_row = Div (masked, floored)
    },
    else_branch = plain () => (plain_row)
    {
      plain_row = Identity (masked)
    }
  >
  y = CastLike (result, x)
}
"""

OP = Op("TopKSparsify", torch.ops.qsparse.topk_sparsify.default, _translate, _schema, BODY, reference)
