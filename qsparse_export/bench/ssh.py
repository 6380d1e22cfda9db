"""Runs shell scripts on another machine through the OpenSSH client, with an end to every wait."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import IO

from qsparse_export.errors import TargetError

_DEFAULTS = (
    "BatchMode=yes",  # a question that nobody answers would hang
    "ConnectTimeout=15",
    "ServerAliveInterval=15",  # a machine that is gone is noticed after a minute
    "ServerAliveCountMax=4",
)
_LOST = 255  # the exit code of ssh itself
_MOST_BYTES = 64 << 20
_LAST_LINES = 60
_JOIN_SECONDS = 10


@dataclass(frozen=True)
class Finished:
    """How a script ended: its exit code (128 + n: signal n), its stdout, and the last lines of its stderr."""

    code: int
    out: str
    said: str


@dataclass(frozen=True)
class Ssh:
    """A machine. ``destination``: what ``ssh`` takes; ``options``: ``Port=2222`` and the like, before ~/.ssh/config's.

    TargetError for a destination that ssh would take for an option.
    """

    destination: str
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.destination or self.destination.startswith("-"):
            raise TargetError(f"{self.destination!r} is no machine; expected one such as pi@raspberrypi")

    def run(
        self,
        script: str,
        *,
        timeout_s: float,
        source: Iterable[bytes] | None = None,
        on_line: Callable[[str], object] | None = None,
    ) -> Finished:
        """Runs ``script`` in a POSIX shell there; ``on_line`` is told each line of its stderr as it comes.

        ``source`` is its stdin; without one stdin stays open and empty until this program ends or gives up, so that a script
        can notice that. TargetError when the machine cannot be reached, refuses the login, or is not done in time.
        """
        flags = [word for option in (*self.options, *_DEFAULTS) for word in ("-o", option)]
        command = ["ssh", "-T", *flags, "--", self.destination, f"sh -c {shlex.quote(script)}"]
        pipe = subprocess.PIPE
        try:
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)
        except OSError as error:
            raise TargetError(
                f"cannot start ssh ({error.strerror}); install it with: apt-get install openssh-client"
            ) from error
        talk = _Talk(process, source, on_line)
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise TargetError(
                f"{self.destination} was not done after {timeout_s:g} seconds, and was ended; give it more with --timeout"
            ) from error
        finally:
            talk.end()
        if talk.trouble is not None:
            raise talk.trouble
        finished = Finished(code, talk.out.decode("utf-8", errors="replace"), "\n".join(talk.lines))
        if code == _LOST:
            raise TargetError(_why(self.destination, finished.said))
        return finished


@dataclass
class _Talk:
    """The three pipes of a process, each served by a thread of its own."""

    process: subprocess.Popen[bytes]
    source: Iterable[bytes] | None
    on_line: Callable[[str], object] | None
    out: bytes = b""
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=_LAST_LINES))
    trouble: Exception | None = None

    def __post_init__(self) -> None:
        works = [self._read, self._listen, *([self._write] if self.source is not None else [])]
        self._threads = [threading.Thread(target=self._guarded, args=(work,), daemon=True) for work in works]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Ends the process, if it has not ended, and the threads."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for thread in self._threads:
            thread.join(_JOIN_SECONDS)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            with contextlib.suppress(OSError):
                _open(pipe).close()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BrokenPipeError:
            pass  # it ended early; its exit code says why
        except Exception as error:  # handed to the thread that waits
            self.trouble = error
            self.process.kill()

    def _read(self) -> None:
        chunks, size = [], 0
        pipe = _open(self.process.stdout).fileno()
        while chunk := os.read(pipe, 1 << 16):  # what has come, not all of that
            chunks.append(chunk)
            size += len(chunk)
            if size > _MOST_BYTES:
                raise TargetError(f"the device printed more than {_MOST_BYTES >> 20} MiB; expected one report")
        self.out = b"".join(chunks)

    def _listen(self) -> None:
        while raw := _open(self.process.stderr).readline(1 << 12):
            # What a device says goes to a terminal: no control characters.
            line = "".join(c for c in raw.decode("utf-8", errors="replace") if c.isprintable())
            self.lines.append(line)
            if self.on_line is not None:
                self.on_line(line)

    def _write(self) -> None:
        pipe = _open(self.process.stdin)
        for chunk in self.source or ():
            pipe.write(chunk)
        pipe.close()


def _open(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


def _why(destination: str, said: str) -> str:
    last = said.strip().splitlines()[-1] if said.strip() else "ssh said nothing"
    if "Permission denied" in said or "Too many authentication failures" in said:
        return (
            f"{destination} refused the login ({last}); bring your key there with: ssh-copy-id {destination}, or name one with "
            "--ssh-option IdentityFile=FILE"
        )
    if "Host key verification failed" in said:
        return (
            f"the key of {destination} is not known here or has changed ({last}); connect once with: ssh {destination}"
        )
    return f"the connection to {destination} failed ({last}); see whether this works: ssh {destination} true"
