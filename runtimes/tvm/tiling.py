"""Tiling: how a kernel cuts its work; what tuning chooses among. Results do not depend on it, but for float32 rounding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from qsparse_export.targets.target import Target

LONG_PIECE_BYTES = 1024
"""Out of memory, shorter pieces of weight rows are read slower."""
DEFAULT_CORES = 4
"""Where the target does not say how many it has."""


def cores_of(target: Target) -> int:
    """Into how many the work of a row is cut on ``target``, for as many threads."""
    return target.threads or target.cores or DEFAULT_CORES


@dataclass(frozen=True)
class Tiling:
    """``parts`` of a row's work go to threads, as pieces of the ``columns`` (True) or as shares of the channels.

    ``rows``: weight rows that are read side by side, at most 64. ``outputs``: those of the head that a thread takes at a time.
    """

    parts: int
    columns: bool = True
    rows: int = 32
    outputs: int = 64


def default_tiling(row_bytes: int, cores: int) -> Tiling:
    """For weight rows of ``row_bytes`` on ``cores``: columns are shared where the pieces are long."""
    return Tiling(parts=cores, columns=row_bytes >= cores * LONG_PIECE_BYTES or cores == 1)


def candidates(row_bytes: int, cores: int) -> list[Tiling]:
    """What tuning measures, the default first."""
    default = default_tiling(row_bytes, cores)
    found = [default]
    for parts in sorted({1, cores, 2 * cores}):
        for columns in (True, False):
            for rows in (16, 32, 64):
                tiling = Tiling(parts, columns or parts == 1, rows)
                if tiling not in found:
                    found.append(tiling)
    return found


def head_candidates(cores: int) -> list[Tiling]:
    """The same for the head."""
    return [Tiling(cores, outputs=outputs) for outputs in (64, 16, 32, 128, 256, 512)]


class Tilings(Protocol):
    """Which tiling a kernel gets."""

    def choose(self, make: Callable[..., Any], static: Mapping[str, Any], row_bytes: int) -> Tiling:
        """For the kernel that ``make`` makes of ``static`` values, whose weight rows have ``row_bytes``."""
        ...


@dataclass(frozen=True)
class DefaultTilings:
    """Tilings by rule."""

    cores: int

    def choose(self, make: Callable[..., Any], static: Mapping[str, Any], row_bytes: int) -> Tiling:
        """See :class:`Tilings`."""
        return default_tiling(row_bytes, self.cores)
