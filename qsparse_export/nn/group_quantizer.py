"""Group quantisation of float weights: the scale of each group is chosen by squared error, then the codes follow from it.

A weight becomes ``code * scale``, codes signed and symmetric around 0 (``formats.nbits``). The largest weight of a group
gets the outermost code, -2**(bits - 1), so a scale may be negative: one more code is used than with absmax scaling.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qsparse_export.errors import CheckpointError
from qsparse_export.weight_formats import GroupFormat

SLICE_WEIGHTS = 1 << 22
"""Weights quantised at a time: some temporaries of 16 MB each, whatever the size of the matrix."""

# Multiples of "the largest weight gets the outermost code" that are tried. A few percent clipped or left free buy accuracy
# at 4 bits (docs/adr/n-bit-groups-along-the-inputs.md); at 8 bits there is little to gain.
_MULTIPLES = {4: (0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1), 8: (0.98, 1.0, 1.02)}
_LARGEST_FLOAT16 = 65504.0


@torch.no_grad()
def group_scales(name: str, weight: torch.Tensor, chosen: GroupFormat) -> tuple[torch.Tensor, float]:
    """Scales of ``weight`` [N, K] (any floating dtype), float16 [N, groups], and the relative error that they leave.

    Each scale is the best of some candidates after a least-squares fit, ``sum(w * code) / sum(code**2)``; 0 for a group of
    zeros, and where float16 has nothing small enough. The error is the L2 norm of what is lost over that of ``weight``.
    Raises CheckpointError naming the tensor for NaN, Inf, or weights whose scale float16 cannot hold.
    """
    n = len(weight)
    groups = -(-weight.shape[1] // chosen.group)
    scales = torch.empty((n, groups), dtype=torch.float16)
    lost = total = 0.0
    for rows in _slices(weight):
        w = _grouped(weight[rows], chosen.group)
        signed_largest = w.gather(-1, w.abs().argmax(-1, keepdim=True))
        _require_range(name, signed_largest, chosen)
        found = _best_scale(w, signed_largest, chosen.bits).to(torch.float16)
        scales[rows] = found.squeeze(-1)
        wide = found.to(torch.float32)
        lost += float((w - _codes(w, wide, chosen.bits) * wide).square().sum(dtype=torch.float64))
        total += float(w.square().sum(dtype=torch.float64))
    return scales, (lost / total) ** 0.5 if total else 0.0


@torch.no_grad()
def group_codes(weight: torch.Tensor, scales: torch.Tensor, chosen: GroupFormat) -> torch.Tensor:
    """int8 [N, K]: the code nearest to each weight of [N, K], given float16 scales [N, groups]."""
    codes = torch.empty(weight.shape, dtype=torch.int8)
    for rows in _slices(weight):
        wide = scales[rows].to(torch.float32).unsqueeze(-1)
        grouped = _codes(_grouped(weight[rows], chosen.group), wide, chosen.bits)
        codes[rows] = grouped.flatten(1)[:, : weight.shape[1]].to(torch.int8)
    return codes


def _slices(weight: torch.Tensor) -> Iterator[slice]:
    step = max(1, SLICE_WEIGHTS // max(1, weight.shape[1]))
    return (slice(begin, begin + step) for begin in range(0, len(weight), step))


def _grouped(rows: torch.Tensor, group: int) -> torch.Tensor:
    """[n, K] to float32 [n, groups, group]; a short last group is filled up with zeros, which count for nothing."""
    wide = torch.nn.functional.pad(rows.to(torch.float32), (0, -rows.shape[1] % group))
    return wide.unflatten(1, (-1, group))


def _codes(w: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """float32 integers [..., group]; 0 where the scale is."""
    half = 1 << bits - 1
    return torch.where(scale == 0, 0.0, w / scale).round_().clamp_(-half, half - 1)


def _best_scale(w: torch.Tensor, signed_largest: torch.Tensor, bits: int) -> torch.Tensor:
    """float32 [n, groups, 1], by least squares from the candidate whose codes explain most of ``w``."""
    half = 1 << bits - 1
    candidates = [signed_largest * (-multiple / half) for multiple in _MULTIPLES[bits]]
    candidates.append(signed_largest.abs() / (half - 1))
    best = torch.zeros_like(signed_largest)
    most = torch.zeros_like(signed_largest)
    for candidate in candidates:
        codes = _codes(w, candidate, bits)
        product, square = (w * codes).sum(-1, keepdim=True), codes.square().sum(-1, keepdim=True).clamp_min(1)
        # |w - s c|^2 is smallest at s = <w, c> / <c, c>, where it is |w|^2 - <w, c>^2 / <c, c>.
        fitted = product / square
        explained = product * fitted
        is_better = explained > most
        best, most = torch.where(is_better, fitted, best), torch.where(is_better, explained, most)
    return best


def _require_range(name: str, signed_largest: torch.Tensor, chosen: GroupFormat) -> None:
    largest = float(signed_largest.abs().amax()) if signed_largest.numel() else 0.0
    # A scale may be up to a few percent above largest / half; half of float16's range is far above any real weight.
    most = _LARGEST_FLOAT16 / 2 * (1 << chosen.bits - 1)
    if not largest <= most:  # refuses NaN too
        raise CheckpointError(
            f"tensor {name} holds a weight of magnitude {largest:g}; {chosen.bits}-bit groups with float16 scales hold finite "
            f"weights up to {most:g}: repair the checkpoint, or keep the weights with --weights keep --head keep"
        )
