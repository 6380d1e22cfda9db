"""Which weights one decode step reads, from the graph: row by row where inactive channels are skipped, else whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qsparse_export.bench.dense_graph import rescales, selects
from qsparse_export.ops.base import DOMAIN

if TYPE_CHECKING:
    import onnx_ir as ir

_STANDARD_PRODUCTS = frozenset({"MatMul", "Gemm", "MatMulNBits"})
_QUANTISING = frozenset({"TernaryMatMul", "SparseTernaryMatMul"})
"""Ops that skip a channel when its int8 value is 0, not only when its float value is."""
_GAMMA_FLOOR = 1e-5  # ops.ternary_matmul


@dataclass(frozen=True)
class Product:
    """A node that multiplies the activations ``x`` [..., ``channels``], the name of a value, by constant weights.

    ``linears``: the PyTorch modules it stands for. ``weight_bytes``: of weights that nothing else reads; with ``skips``
    one row of them per input channel, read only where the channel is active. The node itself keeps ``kept`` channels of
    every ``block`` (0: of the row) and, with ``quantises``, drops what int8 rounds to 0. It gives ``outputs`` values per row.
    """

    op: str
    linears: tuple[str, ...]
    x: str
    channels: int
    weight_bytes: int
    skips: bool
    kept: int
    block: int
    quantises: bool
    rescales: bool
    outputs: int

    def active(self, x: np.ndarray) -> np.ndarray:
        """int64 [rows]: the channels of each row of ``x`` [..., channels] whose weights contribute to the result."""
        rows = x.reshape(-1, self.channels).astype(np.float32)
        nonzero = self._quantised(rows) != 0 if self.quantises else rows != 0
        width = self.block or self.channels
        padding = -self.channels % width
        units = (self.channels + padding) // width
        blocks = np.pad(nonzero, ((0, 0), (0, padding))).reshape(len(rows), units, width)
        # Top-k takes the largest magnitudes, and rounding to int8 keeps their order: what is kept and yet zero comes last.
        return np.minimum(blocks.sum(-1), self.kept).sum(-1)

    def _quantised(self, rows: np.ndarray) -> np.ndarray:
        magnitude = np.where(np.isfinite(rows), np.abs(rows), np.float32(0))
        # The norm of a row that was rescaled lies above the floor already.
        floor = np.float32(np.finfo(np.float32).tiny if self.rescales else _GAMMA_FLOOR)
        gamma = np.maximum(magnitude.max(-1, keepdims=True, initial=0), floor)
        return np.rint(np.float32(127) / gamma * magnitude)

    def bytes_read(self, active: np.ndarray) -> float:
        """Bytes of weights read for rows with these ``active`` channels, one row at a time."""
        if not self.skips:
            return float(self.weight_bytes * len(active))
        return float(self.weight_bytes * active.sum() / self.channels)


@dataclass(frozen=True)
class WeightReads:
    """The products of a graph in its order, and the bytes of all other weights that every token reads.

    An embedding counts with one row per token. Weights that two nodes read count once.
    """

    products: tuple[Product, ...]
    other_bytes: int


def weight_reads(graph: ir.Graph) -> WeightReads:
    """Reads the nodes and the shapes, dtypes and names of the initialisers of ``graph``; no weight itself."""
    owned: dict[int, list[ir.Value]] = {}
    other_bytes = 0
    nodes = list(graph)
    position = {id(node): i for i, node in enumerate(nodes)}
    for value in graph.initializers.values():
        if value.const_value is None:
            continue
        uses = list(_uses(value))
        readers = {id(node): node for node, at in uses if not _reads_one_row(node, at)}
        if not readers:
            other_bytes += value.const_value.nbytes // max(1, value.const_value.shape.numpy()[0]) if uses else 0
            continue
        reader = next(iter(readers.values()))
        if len(readers) == 1 and id(reader) in position and _is_product(reader) and _is_matrix(reader, value):
            owned.setdefault(position[id(reader)], []).append(value)
        else:
            other_bytes += value.const_value.nbytes
    return WeightReads(tuple(_product(nodes[i], owned[i]) for i in sorted(owned)), other_bytes)


def _uses(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """The nodes that read ``value``, as it is or in another shape, and which of their inputs it is."""
    for node, at in value.uses():
        if node.op_type == "Reshape" and node.domain == "" and at == 0:
            yield from _uses(node.outputs[0])
        else:
            yield node, at


_INDICES = {(DOMAIN, "GatherNBits"): 0, ("com.microsoft", "GatherBlockQuantized"): 1}
"""Which input holds the tokens of an embedding; all others hold a row for each."""


def _reads_one_row(node: ir.Node, position: int) -> bool:
    """Whether a decode step takes one row of input ``position``: the token's embedding, or what belongs to its place."""
    axis = next((node.attributes[name].as_int() for name in ("axis", "gather_axis") if name in node.attributes), 0)
    if (indices := _INDICES.get((node.domain, node.op_type))) is not None:
        return position != indices and axis == 0
    return node.op_type == "Gather" and node.domain == "" and position == 0 and axis == 0


def _width(node: ir.Node) -> int | None:
    return _width_of(node.inputs[0])


def _width_of(x: ir.Value | None) -> int | None:
    width = x.shape[-1] if x is not None and x.shape is not None and len(x.shape) else None
    return width if isinstance(width, int) else None


def _is_product(node: ir.Node) -> bool:
    first = node.inputs[0] if node.inputs else None
    is_known = node.domain == DOMAIN or node.op_type in _STANDARD_PRODUCTS
    return is_known and first is not None and not first.is_initializer() and _width(node) is not None


def _skips(node: ir.Node) -> bool:
    return selects(node) or (node.domain == DOMAIN and node.op_type == "TernaryMatMul")


def _is_matrix(node: ir.Node, value: ir.Value) -> bool:
    """What skips has one row per input channel; what else it reads (scales of groups) it reads whole."""
    assert value.const_value is not None
    shape = value.const_value.shape.numpy()
    return len(shape) >= 2 and (not _skips(node) or shape[0] == _width(node))


def _product(node: ir.Node, weights: list[ir.Value]) -> Product:
    x, width = node.inputs[0], _width(node)
    assert x is not None and x.name is not None and width is not None
    attributes = node.attributes if selects(node) else {}
    return Product(
        op=node.op_type,
        linears=tuple(dict.fromkeys(linear for value in weights for linear in linears_of(value.name or ""))),
        x=x.name,
        channels=width,
        weight_bytes=sum(value.const_value.nbytes for value in weights if value.const_value is not None),
        skips=_skips(node),
        kept=attributes["k"].as_int() if attributes else width,
        block=attributes["block"].as_int() if attributes else 0,
        quantises=node.domain == DOMAIN and node.op_type in _QUANTISING,
        rescales=selects(node) and rescales(node),
        outputs=_width_of(node.outputs[0]) or 0,
    )


def linears_of(weight: str) -> tuple[str, ...]:
    """Names of the linears whose weights are in the initialiser called ``weight``.

    ``a.q_proj.packed`` is a.q_proj; fused ones are called ``a.q_proj+k_proj.packed`` or ``a.gate.packed+b.up.packed``, and
    those that lower-nbits gave another form ``a.rows.blocks`` or ``a.row_scales.float``.
    """
    for form in (".blocks", ".float"):
        weight = weight.removesuffix(form)
    leaf = weight.rpartition(".")[2]
    whole = weight.split("+")
    if all(name.endswith(f".{leaf}") for name in whole):
        return tuple(name.removesuffix(f".{leaf}") for name in whole)
    parts = weight.split(".")[:-1]
    at = next((i for i, part in enumerate(parts) if "+" in part), 0)
    return tuple(".".join([*parts[:at], name, *parts[at + 1 :]]) for name in parts[at].split("+"))
