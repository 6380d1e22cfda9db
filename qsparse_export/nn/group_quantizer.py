"""Group quantisation of float weights: the scale of each group is chosen by squared error, then the codes follow from it.

A weight becomes ``code * scale``, codes signed and symmetric around 0 (``formats.nbits``). The largest weight of a group
gets the outermost code, -2**(bits - 1), so a scale may be negative: one more code is used than with absmax scaling.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from qsparse_export.errors import CheckpointError
from qsparse_export.weight_formats import GroupFormat

SLICE_WEIGHTS = 1 << 18
"""Weights quantised at a time, so that the dozen passes over them and their codes stay in a core's cache."""

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
    _require_range(name, weight, chosen)
    with _one_thread():
        return _scales_and_error(weight, chosen)


def _scales_and_error(weight: torch.Tensor, chosen: GroupFormat) -> tuple[torch.Tensor, float]:
    scales = torch.empty((len(weight), -(-weight.shape[1] // chosen.group)), dtype=torch.float16)
    lost = total = 0.0
    for rows in _slices(weight):
        w = _grouped(weight[rows], chosen.group)
        found = _best_scale(w, chosen.bits).to(torch.float16)
        scales[rows] = found
        wide = found.to(torch.float32)
        lost += float((_codes(w, wide, chosen.bits).mul_(wide) - w).square_().sum())
        total += float(w.square().sum())
    return scales, (lost / total) ** 0.5 if total else 0.0


@torch.no_grad()
def group_codes(weight: torch.Tensor, scales: torch.Tensor, chosen: GroupFormat) -> torch.Tensor:
    """int8 [N, K]: the code nearest to each weight of [N, K], given float16 scales [N, groups]."""
    codes = torch.empty(weight.shape, dtype=torch.int8)
    with _one_thread():
        for rows in _slices(weight):
            grouped = _codes(_grouped(weight[rows], chosen.group), scales[rows].to(torch.float32), chosen.bits)
            codes[rows] = grouped.to(torch.int8).permute(1, 2, 0).flatten(1)[:, : weight.shape[1]]
    return codes


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Operations on slices are short: on a busy machine PyTorch's threads wait for each other five times as long as they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _slices(weight: torch.Tensor) -> Iterator[slice]:
    step = max(1, SLICE_WEIGHTS // max(1, weight.shape[1]))
    return (slice(begin, begin + step) for begin in range(0, len(weight), step))


def _grouped(rows: torch.Tensor, group: int) -> torch.Tensor:
    """[n, K] to float32 [group, n, groups]; a short last group is filled up with zeros, which count for nothing.

    The members of a group come first, since sums over a short last dimension take PyTorch several times as long.
    """
    wide = torch.nn.functional.pad(rows.to(torch.float32), (0, -rows.shape[1] % group))
    return wide.unflatten(1, (-1, group)).permute(2, 0, 1).contiguous()


def _codes(w: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """float32 integers [group, n, groups]; 0 where the scale [n, groups] is."""
    half = 1 << bits - 1
    # Zero over infinity is zero: no group of zeros divides by zero, and no scale that is 0 gives a code.
    return (w / torch.where(scale == 0, torch.inf, scale)).round_().clamp_(-half, half - 1)


def _best_scale(w: torch.Tensor, bits: int) -> torch.Tensor:
    """float32 [n, groups], by least squares from the candidate whose codes explain most of ``w`` [group, n, groups]."""
    half = 1 << bits - 1
    low, high = w.amin(0), w.amax(0)
    signed_largest = torch.where(-low > high, low, high)
    candidates = [signed_largest * (-multiple / half) for multiple in _MULTIPLES[bits]]
    candidates.append(signed_largest.abs() / (half - 1))
    best, most = torch.zeros_like(low), torch.zeros_like(low)
    for candidate in candidates:
        codes = _codes(w, candidate, bits)
        product = (w * codes).sum(0)
        # |w - s c|^2 is smallest at s = <w, c> / <c, c>, where it is |w|^2 - <w, c>^2 / <c, c>.
        fitted = product / codes.square_().sum(0).clamp_min_(1)
        explained = product * fitted
        is_better = explained > most
        best, most = torch.where(is_better, fitted, best), torch.where(is_better, explained, most)
    return best


def _require_range(name: str, weight: torch.Tensor, chosen: GroupFormat) -> None:
    # A scale may be some percent above largest / half; half of float16's range is far above any real weight.
    most = _LARGEST_FLOAT16 / 2 * (1 << chosen.bits - 1)
    extremes = [abs(float(extreme)) for extreme in weight.aminmax()] if weight.numel() else []
    if not all(extreme <= most for extreme in extremes):  # refuses NaN too
        raise CheckpointError(
            f"tensor {name} holds a weight of magnitude {max(extremes):g}; {chosen.bits}-bit groups with float16 scales hold "
            f"finite weights up to {most:g}: repair the checkpoint, or keep the weights with --weights keep --head keep"
        )
