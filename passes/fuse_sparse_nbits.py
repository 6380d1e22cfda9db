"""Fuses a top-k mask and the 4- or 8-bit matrices behind it into one node with one long row of weights per channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qsparse_export.passes.base import Pass, PassResult
from qsparse_export.passes.join_matrices import DOMAIN, Family, join_all


def _why_not(node: ir.Node) -> str:
    attributes = node.attributes
    weights = node.inputs[1]
    width = weights.shape[0] if weights is not None and weights.shape is not None else None
    if attributes["k"].as_int() != width or attributes["block"].as_int() or len(attributes["n"].as_ints()) != 1:
        return "the node has a mask of its own, or several matrices"
    return "" if attributes["rescale"].as_string() == "none" else "the node rescales"


NBITS = Family(
    domain=DOMAIN,
    product="SparseMatMulNBits",
    joined="SparseMatMulNBits",
    operands=((1, 1), (2, 1)),
    why_not=_why_not,
    outputs=lambda node: node.attributes["n"].as_ints()[0],
    attributes=lambda node: {name: node.attributes[name].as_int() for name in ("bits", "group")},
    joins_alone=True,
    is_choice=False,
)


@dataclass(frozen=True)
class FuseSparseNBits(Pass):
    """Makes one ``SparseMatMulNBits`` of TopKSparsify and those behind it, or of several on one value.

    Before::

        h = TopKSparsify<k, block, rescale>(x)
        q = SparseMatMulNBits<k=K, n=[4]>(h, wq, sq); v = SparseMatMulNBits<k=K, n=[2]>(h, wv, sv)

    After::

        y = SparseMatMulNBits<k, block, rescale, n=[4, 2]>(x, "wq+wv", "sq+sv")
        q, v = Split<axis=-1>(y, [4, 2])
    """

    name: ClassVar[str] = "fuse-sparse-nbits"

    def call(self, model: ir.Model) -> PassResult:
        """See :class:`Pass`."""
        return PassResult(model, join_all(model.graph, NBITS))
