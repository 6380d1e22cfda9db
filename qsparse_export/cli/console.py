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
    """A bar over the stages of the work, and a line with the seconds of each that is done."""

    def __init__(self, count: int, *, quiet: bool) -> None:
        from tqdm import tqdm

        self._quiet = quiet
        self._bar = tqdm(
            total=count,
            bar_format="{desc:<10}{bar:24} {n_fmt}/{total_fmt} {elapsed}",
            leave=False,
            disable=True if quiet else None,  # None: on a terminal only
        )
        self._name: str | None = None
        self._start = 0.0

    def step(self, done: int, total: int, text: str) -> None:
        """A line about one of ``total`` steps of the current stage, and how far that is."""
        if not self._quiet:
            self._bar.write(f"    [{done}/{total}] {text}", file=sys.stderr)
        self._bar.set_description_str(f"{self._name} {done}/{total}")

    def __call__(self, name: str | None) -> None:
        """Ends the current stage and begins ``name`` (None: all is done)."""
        now = time.perf_counter()
        if self._name:
            self._bar.update()
            if not self._quiet:
                self._bar.write(f"  {self._name:<8} {now - self._start:6.1f} s", file=sys.stderr)
        self._name, self._start = name, now
        if name:
            self._bar.set_description_str(name)
        else:
            self._bar.close()


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _paragraph(text: str) -> str:
    return "\n".join(
        textwrap.fill(line, 120, break_long_words=False, break_on_hyphens=False) for line in text.splitlines()
    )
