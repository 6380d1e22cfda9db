"""Which compiled modules this machine made: a module is code, and one that came from elsewhere runs only if it is trusted."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from qsparse_export.errors import BundleError, UsageError

TRUST_VARIABLE = "QSPARSE_TRUST_MODULES"


def remember(module: Path) -> None:
    """Notes that ``module`` was compiled here; where the user's cache cannot be written, it will have to be trusted."""
    note = _note(module)
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()
    except OSError:
        return


def require_trust(module: Path) -> None:
    """Raises BundleError, before any code of ``module`` runs, unless it was compiled here or the user trusts all modules."""
    word = os.environ.get(TRUST_VARIABLE, "0")
    if word not in ("0", "1"):
        raise UsageError(f"{TRUST_VARIABLE} is {word!r}; expected 0 or 1")
    if word == "0" and not _note(module).exists():
        raise BundleError(
            f"{module} was not compiled on this machine, by this user: loading it runs its code. Set {TRUST_VARIABLE}=1 if "
            "you trust whoever made it, or export the model here"
        )


def _note(module: Path) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    with module.open("rb") as file:
        return Path(base) / "qsparse-export" / "tvm-made-here" / hashlib.file_digest(file, "sha256").hexdigest()
