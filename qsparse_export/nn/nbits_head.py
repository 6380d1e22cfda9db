"""The deployed language model head as 4- or 8-bit groups, output-major, and the embedding that is the head too."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Self

import torch

from qsparse_export.formats import nbits
from qsparse_export.nn.fixed_buffers import FixedBuffers
from qsparse_export.ops.dense_matmul_nbits import dense_matmul_nbits
from qsparse_export.ops.gather_nbits import gather_nbits
from qsparse_export.weight_formats import GroupFormat


class NBitsHead(FixedBuffers):
    """``logits = X dequantize(rows, row_scales)^T``: rows uint8 [N, bytes], row_scales float16 [N, groups] (``formats.nbits``).

    ``inputs`` is K. The scales stay float16 when the module is cast.
    """

    FIXED: ClassVar[tuple[str, ...]] = ("row_scales",)

    def __init__(self, rows: torch.Tensor, row_scales: torch.Tensor, inputs: int, chosen: GroupFormat) -> None:
        super().__init__()
        _check(rows, row_scales, inputs, chosen)
        self.rows: torch.Tensor
        self.row_scales: torch.Tensor
        self.register_buffer("rows", rows)
        self.register_buffer("row_scales", row_scales)
        self.format = chosen

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [..., K] to logits [..., N] of the same dtype."""
        return _product(hidden, self.rows, self.row_scales, self.format)


class NBitsEmbedding(FixedBuffers):
    """An embedding that is the head too: one quantised matrix, as in :class:`NBitsHead`, looked up and multiplied with.

    ``dtype`` is that of the embedded rows and changes when the module is cast.
    """

    FIXED: ClassVar[tuple[str, ...]] = ("row_scales",)

    def __init__(
        self, rows: torch.Tensor, row_scales: torch.Tensor, inputs: int, chosen: GroupFormat, dtype: torch.dtype
    ) -> None:
        super().__init__()
        _check(rows, row_scales, inputs, chosen)
        self.rows: torch.Tensor
        self.row_scales: torch.Tensor
        self.register_buffer("rows", rows)
        self.register_buffer("row_scales", row_scales)
        self.inputs = inputs
        self.format = chosen
        self.dtype = dtype

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int64 [...] to rows [..., K]."""
        bits, group = self.format.bits, self.format.group
        return gather_nbits(ids, self.rows, self.row_scales, self.inputs, bits, group).to(self.dtype)

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [..., K] to logits [..., N] of the same dtype."""
        return _product(hidden, self.rows, self.row_scales, self.format)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self


def _product(hidden: torch.Tensor, rows: torch.Tensor, row_scales: torch.Tensor, chosen: GroupFormat) -> torch.Tensor:
    return dense_matmul_nbits(hidden, rows, row_scales, len(rows), chosen.bits, chosen.group)


def _check(rows: torch.Tensor, row_scales: torch.Tensor, inputs: int, chosen: GroupFormat) -> None:
    n = len(rows)
    expected = (n, nbits.output_row_bytes(inputs, chosen.bits)), (n, nbits.group_count(inputs, chosen.group))
    if (tuple(rows.shape), tuple(row_scales.shape)) != expected:
        raise ValueError(
            f"rows {list(rows.shape)} and scales {list(row_scales.shape)} are not {inputs} inputs of {chosen}"
        )
