"""PyTorch following the discrete choices of a compiled model, each of which must be one that PyTorch could have made.

A top-k mask and an int8 rounding are discontinuous: two correct implementations, summing in another order, now and then
choose another channel, and the logits of a sparse model then move by percents. Compared freely, such a model cannot be told
from a wrong one. So PyTorch is run with the choices that the compiled model made (which channels TopKSparsify kept, which
integers TernaryMatMul quantised to): what remains is continuous and must agree to rounding; and every choice is checked
against PyTorch's own values: it may differ from PyTorch's choice only where the two were a tie up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qsparse_export.ops.ternary_matmul import GAMMA_FLOOR, ternary_matmul, unpacked
from qsparse_export.ops.topk_sparsify import topk_sparsify

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN = "ai.qsparse"
_PRODUCTS_OF_FUSED = {"SparseTernaryMatMul": "TernaryMatMul", "SparseMatMulNBits": None, "SparseMatMul": None}
"""Ops with a mask of their own -> the op that chooses in each of their matrices, None where products are continuous."""
_WITHOUT_CHOICES = frozenset({"DenseMatMulNBits", "GatherNBits", "CachedAttention", "GatedActivation", "AddRmsNorm"})


@dataclass(frozen=True)
class Tap:
    """One op whose choices are read: the graph value that shows them, and the PyTorch module that it came from.

    ``selection`` (k, block, rescale) where the value is what a fused node selects from: its mask is made again, by the same
    definition, from the value that the compiled model had. ``rows`` where the op computes more rows than PyTorch's: the value
    bool [tokens, 1] that is true in those.
    """

    op: str
    value: str
    scope: str
    selection: tuple[int, int, str] | None = None
    rows: str | None = None

    @property
    def values(self) -> tuple[str, ...]:
        """The graph values that it reads."""
        return (self.value,) if self.rows is None else (self.value, self.rows)

    def choice_in(self, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """What the op chose for the rows that PyTorch has, by the ``values`` of the graph."""
        shown = values[self.value]
        return self.choice(shown if self.rows is None else shown[values[self.rows][:, 0]])

    def choice(self, values: np.ndarray) -> np.ndarray:
        """What the op chose, as a masked row, when the graph value was ``values``."""
        if self.selection is None:
            return values
        return topk_sparsify(torch.from_numpy(np.array(values)), *self.selection).numpy()


@dataclass(frozen=True)
class IllegitimateChoice:
    """A choice that PyTorch's values do not allow: where, and what was wrong with it."""

    scope: str
    reason: str


def choice_taps(graph: ir.Model) -> tuple[Tap, ...]:
    """The taps of all ops of domain ``ai.qsparse`` that choose, in the order in which PyTorch calls them.

    TopKSparsify shows its choice in its output (what is not zero was kept), TernaryMatMul in its input. A node with a mask
    of its own (SparseTernaryMatMul, SparseMatMulNBits, SparseMatMul) stands for the calls that it was made of, and shows the
    choices of all of them in its input. Ops that only multiply or look up in floating point choose nothing.
    """
    from qsparse_export.passes.lower_inline_bodies import choosing_nodes

    return tuple(tap for node in choosing_nodes(graph) for tap in taps_of(node))


def taps_of(node: ir.Node) -> list[Tap]:
    """The taps of one node of domain ``ai.qsparse``."""
    from qsparse_export.passes.annotate_scope import SCOPE
    from qsparse_export.passes.original_choices import ROWS

    value = node.outputs[0] if node.op_type == "TopKSparsify" else node.inputs[0]
    assert value is not None and value.name is not None
    scope = node.metadata_props.get(SCOPE, node.name or "")
    if node.op_type in _PRODUCTS_OF_FUSED:
        return _fused_taps(node, value, scope)
    rows = node.metadata_props.get(ROWS)
    return [] if node.op_type in _WITHOUT_CHOICES else [Tap(node.op_type, value.name, scope, rows=rows)]


def _fused_taps(node: ir.Node, value: ir.Value, scope: str) -> list[Tap]:
    from qsparse_export.passes.original_choices import ROWS

    attributes = node.attributes
    assert value.name is not None and value.shape is not None
    k, block, rescale = (attributes["k"].as_int(), attributes["block"].as_int(), attributes["rescale"].as_string())
    is_masked = block > 0 or rescale != "none" or k != value.shape[-1]
    selection = (k, block, rescale) if is_masked else None
    product = _PRODUCTS_OF_FUSED[node.op_type]
    matrices = [product] * len(attributes["n"].as_ints()) if product is not None else []
    rows = node.metadata_props.get(ROWS)
    return [Tap(op, value.name, scope, selection, rows) for op in [*(["TopKSparsify"] if is_masked else []), *matrices]]


class Guide(TorchDispatchMode):
    """While active, the custom ops take their choices from ``choices`` (tap, values of the compiled model), in order.

    ``limit`` is the relative error (L2) that the values themselves may have. Afterwards ``flips`` counts the choices that
    PyTorch alone would have made otherwise, ``wrong`` lists those that it could not have made.
    """

    def __init__(self, choices: Iterable[tuple[Tap, np.ndarray]], limit: float) -> None:
        super().__init__()
        self._choices = iter(choices)
        self._limit = limit
        self.flips = 0
        self.wrong: list[IllegitimateChoice] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Intercepts the two custom ops; everything else runs as it is."""
        named = dict(kwargs or {})
        if func is torch.ops.qsparse.topk_sparsify.default:
            return self._topk(*args, **named)
        if func is torch.ops.qsparse.ternary_matmul.default:
            return self._ternary(*args, **named)
        return func(*args, **named)

    def _next(self, op: str, x: torch.Tensor) -> tuple[Tap, torch.Tensor | None]:
        tap, values = next(self._choices)
        if tap.op != op or tuple(values.shape) != tuple(x.shape):
            came = f"{tap.op} {list(values.shape)}, PyTorch {op} {list(x.shape)}"
            self.wrong.append(IllegitimateChoice(tap.scope, f"the compiled model has {came} here"))
            return tap, None
        return tap, torch.from_numpy(np.array(values))

    def _topk(self, x: torch.Tensor, k: int, block: int, rescale: str) -> torch.Tensor:
        tap, kept = self._next("TopKSparsify", x)
        own = topk_sparsify(x, k, block, "none")
        if kept is None:
            return own
        mask = kept != 0
        self.check_mask(tap, x.float(), mask, own != 0)
        masked = torch.where(mask, x, 0)
        if rescale == "none":
            return masked
        # Nothing more to choose: the rescale alone, on all that is left.
        return topk_sparsify(masked, min(x.shape[-1], block or x.shape[-1]), block, rescale)

    def check_mask(self, tap: Tap, x: torch.Tensor, mask: torch.Tensor, own: torch.Tensor) -> None:
        """Compares ``mask``, which the compiled model chose, with the judge's ``own`` for ``x``, all [..., K]."""
        differs = (mask != own).flatten(0, -2)
        rows = differs.any(-1).nonzero().flatten().tolist()
        magnitude = x.abs().flatten(0, -2)
        for row in rows:
            dropped = magnitude[row][differs[row] & own.flatten(0, -2)[row]].sort().values
            taken = magnitude[row][differs[row] & mask.flatten(0, -2)[row]].sort().values
            self.flips += max(len(dropped), len(taken))
            # A kept zero cannot be told from a dropped channel: what one side has more must be zero up to rounding.
            pairs = min(len(dropped), len(taken))
            excess = torch.cat((dropped[: len(dropped) - pairs], taken[: len(taken) - pairs]))
            gaps = (dropped[len(dropped) - pairs :] - taken[len(taken) - pairs :]).abs()
            worst = float(torch.cat((excess, gaps)).max())
            # Each value may be off by limit * |row|, so two of them tie when they are closer than twice that.
            slack = 2 * self._limit * float(magnitude[row].norm())
            if not worst <= slack:
                reason = f"TopKSparsify kept other channels: magnitudes {worst:.3g} apart, a tie is below {slack:.3g}"
                self.wrong.append(IllegitimateChoice(tap.scope, reason))
                return

    def _ternary(self, x: torch.Tensor, w: torch.Tensor, scale: torch.Tensor, n: int) -> torch.Tensor:
        tap, theirs = self._next("TernaryMatMul", x)
        own = ternary_matmul(x, w, scale, n)
        if theirs is None or not x.numel():
            return own
        mine_scaled, gamma = _scaled(x)
        q = rounded(theirs)
        if not self.check_rounding(tap, q, mine_scaled):
            return own
        total = (q.double() @ unpacked(w, n).double()).float()
        return (total * ((gamma / 127.0) * scale)).to(x.dtype)

    def check_rounding(self, tap: Tap, q: torch.Tensor, mine_scaled: torch.Tensor) -> bool:
        """Whether the integers ``q`` of the compiled model are roundings of what the judge would have rounded, [..., K]."""
        self.flips += int((q != mine_scaled.round()).sum())
        # x off by limit * |row| moves 127 / gamma * x by as many units of the quantiser.
        slack = 0.5 + 2 * self._limit * mine_scaled.norm(dim=-1, keepdim=True)
        beyond = (q - mine_scaled).abs() - slack
        if not bool((beyond <= 0).all()):
            reason = (
                f"TernaryMatMul quantised to other integers: {float(beyond.max()) + 0.5:.3g} units beyond a rounding"
            )
            self.wrong.append(IllegitimateChoice(tap.scope, reason))
            return False
        return True


def rounded(x: torch.Tensor) -> torch.Tensor:
    """The integers that TernaryMatMul makes of ``x``, float32 [..., K]."""
    return _scaled(x)[0].round()


def _scaled(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``127 / gamma * x`` before rounding, and gamma, both float32 (semantics of TernaryMatMul)."""
    wide = x.float()
    gamma = wide.abs().amax(-1, keepdim=True).clamp_min(GAMMA_FLOOR)
    # Not 127.0 / gamma, which torch computes as gamma.reciprocal() * 127: another last bit, and a tie rounds the other way.
    return (torch.full_like(gamma, 127.0) / gamma) * wide, gamma
