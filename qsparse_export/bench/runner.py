"""Where a model runs while it is measured: the contract, and the runner that starts a process and talks with it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
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


class Conversation:
    """Talks with a process in JSON lines; ``name`` says in errors what it runs. Any program that speaks them will do.

    ``tell`` is told what the process says of its progress while we wait for an answer.
    """

    def __init__(self, process: subprocess.Popen[str], name: str, tell: Callable[[str], object]) -> None:
        self.name = name
        self._process = process
        self._tell = tell
        self._timeout_s: float | None = None

    def ask(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to ``command``; raises as :meth:`read`."""
        with contextlib.suppress(BrokenPipeError):  # it ended; reading says why
            print(json.dumps(command), file=_pipe(self._process.stdin), flush=True)
        return self.read()

    def read(self) -> dict[str, Any]:
        """The next answer; TargetError when there is none, or what the process itself says went wrong."""
        while True:
            answer = self._line()
            if "progress" not in answer:
                return answer
            self._tell(str(answer["progress"]))

    @contextlib.contextmanager
    def within(self, timeout_s: float) -> Iterator[None]:
        """Ends the process when the block takes longer: whoever waits for an answer is told so."""

        def expire() -> None:
            self._timeout_s = timeout_s
            self._process.kill()

        watch = threading.Timer(timeout_s, expire)
        watch.start()
        try:
            yield
        finally:
            watch.cancel()

    def _line(self) -> dict[str, Any]:
        line = _pipe(self._process.stdout).readline()
        if not line:
            code = self._process.wait()
            if self._timeout_s is not None:
                raise TargetError(
                    f"{self.name} did not finish in {self._timeout_s:g} s; is it still there? Or give it more"
                )
            raise TargetError(f"the process that ran {self.name} ended {_cause(code)}: there is no measurement of it")
        try:
            answer = json.loads(line)
        except ValueError as error:
            raise TargetError(f"{self.name} answered {line[:200]!r}; expected a line of JSON") from error
        if not isinstance(answer, dict):
            raise TargetError(f"{self.name} answered {line[:200]!r}; expected a JSON object")
        if "error" in answer:
            raise _error_class(str(answer.get("kind")))(f"{self.name}: {answer['error']}")
        return answer


class ProcessRunner:
    """The :class:`Runner` of a process that one has a conversation with."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self._opened = self._of(Opened, conversation.read())

    def opened(self) -> Opened:
        """See :class:`Runner`."""
        return self._opened

    def prefill(self, tokens: int) -> Prefill:
        """See :class:`Runner`."""
        return self._of(Prefill, self._conversation.ask({"prefill": tokens}))

    def generate(self, tokens: int) -> tuple[float, ...]:
        """See :class:`Runner`."""
        seconds = self._conversation.ask({"generate": tokens}).get("seconds_per_token", ())
        if len(seconds) != tokens:
            raise TargetError(
                f"{self._conversation.name} timed {len(seconds)} tokens instead of {tokens}; repair its program"
            )
        return tuple(map(float, seconds))

    def footprint(self) -> Footprint:
        """See :class:`Runner`."""
        return self._of(Footprint, self._conversation.ask({"footprint": True}))

    def _of(self, cls: Any, answer: Mapping[str, Any]) -> Any:
        try:
            return cls(**answer)
        except TypeError as error:
            raise TargetError(f"{self._conversation.name} answered {sorted(answer)}; {error}") from error


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
    with conversation(command, name) as talk:
        yield ProcessRunner(talk)


@contextlib.contextmanager
def conversation(
    command: Sequence[str], name: str, tell: Callable[[str], object] = lambda _: None
) -> Iterator[Conversation]:
    """Starts ``command``, to be talked with; it is ended when the block ends, however that happens."""
    pipe = subprocess.PIPE
    try:
        # A group of its own: Ctrl-C reaches us alone, even while it still imports, and we end it.
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, encoding="utf-8", process_group=0)
    except OSError as error:
        raise TargetError(f"cannot start {command[0]}: {error.strerror}") from error
    try:
        yield Conversation(process, name, tell)
    except BaseException:
        process.kill()
        raise
    finally:
        with contextlib.suppress(BrokenPipeError):
            _pipe(process.stdin).close()  # end of input: the process ends by itself
        _pipe(process.stdout).close()
        process.wait()
