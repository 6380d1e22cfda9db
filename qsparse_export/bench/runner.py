"""Where a model runs while it is measured: the contract, and the runner that starts a process and talks with it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from qsparse_export import errors
from qsparse_export.errors import QSparseError, TargetError
from qsparse_export.runtimes.base import NativeCalls


@dataclass(frozen=True)
class Opened:
    """``load_ms``: from the first touch of the files to a model ready to run; ``rss_before_load_bytes``: peak until then."""

    load_ms: float
    rss_before_load_bytes: int


@dataclass(frozen=True)
class Prefill:
    """``seconds`` until the logits of all prompt tokens are there, ``first_token_seconds`` until a token is chosen."""

    seconds: float
    first_token_seconds: float


@dataclass(frozen=True)
class Footprint:
    """What running took: the most memory resident at once, and which native kernels ran how often."""

    peak_rss_bytes: int
    native_calls: NativeCalls


class Runner(Protocol):
    """One opened model, here or on a device. Idle between calls: nothing of it may take time from another runner."""

    def opened(self) -> Opened:
        """What opening cost."""
        ...

    def prefill(self, tokens: int) -> Prefill:
        """Runs the first ``tokens`` of :func:`qsparse_export.bench.prompt.prompt_ids` at once, from an empty cache."""
        ...

    def generate(self, tokens: int) -> tuple[float, ...]:
        """Generates greedily from an empty cache; the seconds of each of ``tokens`` tokens."""
        ...

    def footprint(self) -> Footprint:
        """What all calls so far took."""
        ...


def local_command(bundle: Path, graph: Path | None, *, native: bool, threads: int) -> tuple[str, ...]:
    """The command of :mod:`qsparse_export.bench.session_process`; ``graph`` runs in place of the bundle's own."""
    request = {"bundle": str(bundle), "graph": str(graph) if graph else None, "native": native, "threads": threads}
    # -P: a file called json.py in the working directory must not be imported.
    return (sys.executable, "-P", "-m", "qsparse_export.bench.session_process", json.dumps(request))


class ProcessRunner:
    """Talks with a process in JSON lines; ``name`` says in errors what it runs. Any program that speaks them will do."""

    def __init__(self, process: subprocess.Popen[str], name: str) -> None:
        self._process = process
        self._name = name
        answer = self._read()
        self._opened = self._of(Opened, answer)

    def opened(self) -> Opened:
        """See :class:`Runner`."""
        return self._opened

    def prefill(self, tokens: int) -> Prefill:
        """See :class:`Runner`."""
        return self._of(Prefill, self._ask({"prefill": tokens}))

    def generate(self, tokens: int) -> tuple[float, ...]:
        """See :class:`Runner`."""
        seconds = self._ask({"generate": tokens}).get("seconds_per_token", ())
        if len(seconds) != tokens:
            raise TargetError(f"{self._name} timed {len(seconds)} tokens instead of {tokens}; repair its program")
        return tuple(map(float, seconds))

    def footprint(self) -> Footprint:
        """See :class:`Runner`."""
        return self._of(Footprint, self._ask({"footprint": True}))

    def _ask(self, command: Mapping[str, Any]) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):  # it ended; reading says why
            print(json.dumps(command), file=_pipe(self._process.stdin), flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        line = _pipe(self._process.stdout).readline()
        if not line:
            raise TargetError(
                f"the process that ran {self._name} ended {_cause(self._process.wait())}: there is no measurement of it"
            )
        try:
            answer = json.loads(line)
        except ValueError as error:
            raise TargetError(f"{self._name} answered {line[:200]!r}; expected a line of JSON") from error
        if not isinstance(answer, dict):
            raise TargetError(f"{self._name} answered {line[:200]!r}; expected a JSON object")
        if "error" in answer:
            raise _error_class(str(answer.get("kind")))(f"{self._name}: {answer['error']}")
        return answer

    def _of(self, cls: Any, answer: Mapping[str, Any]) -> Any:
        try:
            return cls(**answer)
        except TypeError as error:
            raise TargetError(f"{self._name} answered {sorted(answer)}; {error}") from error


def _error_class(name: str) -> type[QSparseError]:
    found = vars(errors).get(name)
    return found if isinstance(found, type) and issubclass(found, QSparseError) else TargetError


def _cause(code: int) -> str:
    if code == -9:
        return "by signal 9, as a system short of memory ends one"
    return f"by signal {-code}" if code < 0 else f"with exit code {code}"


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


@contextlib.contextmanager
def process_runner(command: Sequence[str], name: str) -> Iterator[ProcessRunner]:
    """Starts ``command`` and speaks with it; it is ended when the block ends, however that happens."""
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    except OSError as error:
        raise TargetError(f"cannot start {command[0]}: {error.strerror}") from error
    try:
        yield ProcessRunner(process, name)
    except BaseException:
        process.kill()
        raise
    finally:
        with contextlib.suppress(BrokenPipeError):
            _pipe(process.stdin).close()  # end of input: the process ends by itself
        _pipe(process.stdout).close()
        process.wait()
