"""Fuses a top-k mask and the float matrices behind it into one node with one long row of weights per channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qsparse_export.passes.base import Pass, PassResult
from qsparse_export.passes.join_matrices import Family, join_all

_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def _why_not(node: ir.Node) -> str:
    weights = node.inputs[1]
    tensor = weights.const_value if weights is not None else None
    if tensor is None or tensor.dtype not in _TYPES or len(tensor.shape) != 2:
        return "the weights are no float matrix"
    return ""


def _outputs(node: ir.Node) -> int:
    weights = node.inputs[1]
    assert weights is not None and weights.const_value is not None
    return int(weights.const_value.shape.numpy()[1])


FLOAT = Family(
    domain="",
    product="MatMul",
    joined="SparseMatMul",
    operands=((1, 1),),
    why_not=_why_not,
    outputs=_outputs,
    attributes=lambda node: {},
    joins_alone=False,  # without zeros to skip, the runtime's own product is as fast
    is_choice=False,
)


@dataclass(frozen=True)
class FuseSparseMatMul(Pass):
    """Makes ``SparseMatMul`` of TopKSparsify and the MatMul with constant matrices behind it.

    Before::

        h = TopKSparsify<k, block, rescale>(x)
        q = MatMul(h, wq); v = MatMul(h, wv)

    After::

        y = SparseMatMul<k, block, rescale, n=[4, 2]>(x, "wq+wv")
        q, v = Split<axis=-1>(y, [4, 2])
    """

    name: ClassVar[str] = "fuse-sparse-matmul"

    def call(self, model: ir.Model) -> PassResult:
        """See :class:`Pass`."""
        return PassResult(model, join_all(model.graph, FLOAT))
