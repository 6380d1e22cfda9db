"""The one hierarchy of errors: every message says what came, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QSparseError(Exception):
    """Base of every error that this package raises on purpose; the command line exits with ``exit_code``."""

    exit_code = 1


class UsageError(QSparseError):
    """The call itself is wrong: an unknown name, contradicting options."""

    exit_code = 2


class CheckpointError(QSparseError):
    """A checkpoint is malicious, truncated, incomplete, contradictory or of an unknown kind."""


class ExportError(QSparseError):
    """The model could not be turned into a valid graph."""


class TargetError(QSparseError):
    """A target cannot do what was asked, or this machine lacks what the target needs."""


class BundleError(QSparseError):
    """A bundle is damaged, incomplete, or was made for something else."""


class MeasurementError(QSparseError):
    """A benchmark's report is damaged, of another kind, or cannot be written."""


class ParityError(QSparseError):
    """The exported model does not compute what the PyTorch model computes."""


def near_names(name: str, known: Iterable[str]) -> str:
    """``"; did you mean a, b?"`` for the known names close to ``name``, or the list of all known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(names)}"
