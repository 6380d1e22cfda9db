"""What every command shares: errors to one paragraph and an exit code, talk on stderr, machine output on stdout."""

from __future__ import annotations

import json
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from qsparse_export.errors import QSparseError

Main = Callable[[Sequence[str]], None]


def run(command: Main, argv: Sequence[str] | None) -> int:
    """Runs ``command`` on ``argv`` (None: the process's own) and turns its errors into an exit code: 0, 1 or 2."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        command(sys.argv[1:] if argv is None else argv)
    except QSparseError as error:
        say(_paragraph(f"error: {error}"))
        return error.exit_code
    except KeyboardInterrupt:
        say("interrupted; nothing was left behind")
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        sys.stderr.close()
        return 0
    return 0


def say(text: str) -> None:
    """One line of talk, on stderr."""
    print(text, file=sys.stderr, flush=True)


def print_json(plain: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(plain, indent=2), flush=True)


class Stages:
    """Shows the name of each stage as it starts and its seconds when the next one starts."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._name: str | None = None
        self._start = 0.0

    def __call__(self, name: str | None) -> None:
        """Ends the current stage and begins ``name`` (None: none)."""
        now = time.perf_counter()
        if self._name and not self._quiet:
            say(f"  {self._name:<8} {now - self._start:6.1f} s")
        self._name, self._start = name, now


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _paragraph(text: str) -> str:
    return "\n".join(
        textwrap.fill(line, 120, break_long_words=False, break_on_hyphens=False) for line in text.splitlines()
    )
