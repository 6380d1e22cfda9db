"""Notes at each product how sparse it is and how many bytes it reads, for whoever inspects the file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from qsparse_export.ops.base import DOMAIN
from qsparse_export.passes.base import Pass, PassResult

K = "ai.qsparse.k"
DENSITY = "ai.qsparse.density"
BYTES = "ai.qsparse.bytes"
PRODUCTS = frozenset({"MatMul", "Gemm", "MatMulInteger", "MatMulNBits"})


@dataclass(frozen=True)
class AnnotateSparsity(Pass):
    """Writes k, the share of channels kept, and the bytes of the constants into the metadata of masks and products.

    Before: ``y = SparseTernaryMatMul<k=1024, n=[2560]>(x, w, scale)``, x 2560 wide.
    After: the same with ``{ai.qsparse.k: 1024, ai.qsparse.density: 0.4, ai.qsparse.bytes: 1638404}``.

    A product without a mask of its own has that of the TopKSparsify in front of it, or density 1. The density is what the
    mask keeps; natural zeros come on top.
    """

    name: ClassVar[str] = "annotate-sparsity"

    def call(self, model: ir.Model) -> PassResult:
        """See :class:`Pass`; no weight is read."""
        modified = False
        for node in model.graph.all_nodes():
            wanted = _notes(node)
            kept = {key: text for key, text in node.metadata_props.items() if key not in (K, DENSITY, BYTES)}
            if kept | wanted != dict(node.metadata_props):
                node.metadata_props.clear()
                node.metadata_props.update(kept | wanted)
                modified = True
        return PassResult(model, modified)


def _notes(node: ir.Node) -> dict[str, str]:
    is_ours = node.domain == DOMAIN
    if not is_ours and node.op_type not in PRODUCTS:
        return {}
    size = constant_bytes(node)
    if not is_ours and not size:
        return {}  # a product of two activations, as inside attention
    selection = selection_of(node)
    notes = {BYTES: str(size)}
    if selection is not None:
        k, width = selection
        notes |= {K: str(k), DENSITY: f"{k / width if width else 1:.6g}"}
    return notes


def constant_bytes(node: ir.Node) -> int:
    """Bytes of the initialisers that ``node`` reads."""
    tensors = [value.const_value for value in node.inputs if value is not None and value.is_initializer()]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def selection_of(node: ir.Node) -> tuple[int, int] | None:
    """k and out of how many (a row, or a block) at the input of ``node``: its own, or the mask's in front of it.

    (width, width) for a product of an unmasked row; None where the width is not known, or there is no row to speak of.
    """
    x = node.inputs[0] if node.inputs else None
    masked = node if "k" in node.attributes and "rescale" in node.attributes else _mask_of(x)
    if masked is None and not _is_product(node):
        return None
    row = x if masked is None else masked.inputs[0]
    width = row.shape[-1] if row is not None and row.shape is not None and len(row.shape) else None
    if masked is None:
        return (width, width) if isinstance(width, int) else None
    block = masked.attributes.get_int("block", 0)
    out_of = block or width
    return (masked.attributes["k"].as_int(), out_of) if isinstance(out_of, int) else None


def _is_product(node: ir.Node) -> bool:
    return node.op_type in PRODUCTS or (node.domain == DOMAIN and "n" in node.attributes)


def _mask_of(value: ir.Value | None) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and (node.domain, node.op_type) == (DOMAIN, "TopKSparsify") else None
