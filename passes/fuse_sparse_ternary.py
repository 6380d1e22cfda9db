"""Fuses a top-k mask and the ternary matrices behind it into one node with one long row of weights per channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qsparse_export.passes.base import Pass, PassResult
from qsparse_export.passes.join_matrices import DOMAIN, Family, join_all

TERNARY = Family(
    domain=DOMAIN,
    product="TernaryMatMul",
    joined="SparseTernaryMatMul",
    operands=((1, 1), (2, 0)),
    why_not=lambda node: "",
    outputs=lambda node: node.attributes["n"].as_int(),
    attributes=lambda node: {},
    joins_alone=True,  # what is zero by itself is skipped, and int8 rows are made once
    is_choice=True,
)


@dataclass(frozen=True)
class FuseSparseTernary(Pass):
    """Makes ``SparseTernaryMatMul`` of TopKSparsify and TernaryMatMul, or of several TernaryMatMul on one value.

    Before::

        h = TopKSparsify<k, block, rescale>(x)
        q = TernaryMatMul<n=4>(h, wq, sq); v = TernaryMatMul<n=2>(h, wv, sv)

    After::

        y = SparseTernaryMatMul<k, block, rescale, n=[4, 2]>(x, "wq+wv", "sq+sv")
        q, v = Split<axis=-1>(y, [4, 2])
    """

    name: ClassVar[str] = "fuse-sparse-ternary"

    def call(self, model: ir.Model) -> PassResult:
        """See :class:`Pass`."""
        return PassResult(model, join_all(model.graph, TERNARY))
