"""What the environment says of how models run: words of 0 and 1."""

from __future__ import annotations

import os

from qsparse_export.errors import UsageError

SPIN = "QSPARSE_SPIN"
"""Whether threads spin while they wait for the next kernel."""

HUGE_PAGES = "QSPARSE_HUGE_PAGES"
"""Whether weights are moved into huge pages of memory (docs/adr/weights-in-huge-pages.md)."""


def is_on(switch: str, *, otherwise: bool) -> bool:
    """What the environment says of SPIN or HUGE_PAGES, ``otherwise`` where it says nothing; UsageError for another word
    than 0 or 1."""
    word = os.environ.get(switch, "1" if otherwise else "0")
    if word not in ("0", "1"):
        raise UsageError(f"{switch} is {word!r}; expected 0 or 1")
    return word == "1"
