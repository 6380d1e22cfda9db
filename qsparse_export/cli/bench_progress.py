"""How far a benchmark is: a bar over its steps, on a terminal, and notes that stay."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qsparse_export.cli.console import say

if TYPE_CHECKING:
    from tqdm import tqdm


class Progress:
    """Tells people what ``bar`` shows: which step runs, and how far it is."""

    def __init__(self, bar: tqdm) -> None:
        self._bar = bar

    def begin(self, steps: int, text: str = "") -> None:
        """A new bar of so many steps; ``text`` stays above it."""
        self._bar.clear()
        if text:
            say(text)
        self._bar.reset(steps)

    def step(self, name: str) -> None:
        """The next step runs."""
        self._bar.set_postfix_str("", refresh=False)
        self._bar.set_description_str(name)
        self._bar.update()

    def tell(self, text: str) -> None:
        """How far the step is; a line of its own for what begins with ``note:``."""
        if text.startswith("note: "):
            self._bar.clear()
            say(text)
        else:
            self._bar.set_postfix_str(text)
