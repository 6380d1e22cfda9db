"""The near side of one device behind TVM's RPC: a process of its own, since a device that falls silent can only be left so.

The protocol is one JSON object per line, as in :mod:`qsparse_export.bench.session_process`. It borrows a device of a tracker
and says which; at the first line it opens the bundle there, and then it sets threads, generates and times as it is told.

    python -m qsparse_export.bench.rpc_process '{"bundle": DIR, "tracker": "127.0.0.1:9190", "key": "board", ...}'
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import numpy as np

from qsparse_export.bench.prompt import prompt_ids
from qsparse_export.bundle import Bundle
from qsparse_export.errors import QSparseError
from qsparse_export.generate import Generator, greedy
from qsparse_export.runtimes.base import SessionView
from qsparse_export.runtimes.tvm import environment


def main() -> None:
    """Answers each line of stdin by one line on stdout until stdin ends; what fails is a line too, and the last one."""
    # Whatever a library prints on stdout must not get between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(answer: Mapping[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    try:
        for answer in _session(json.loads(sys.argv[1]), sys.stdin, lambda text: say({"progress": text})):
            say(answer)
    except QSparseError as error:
        say({"error": str(error), "kind": type(error).__name__})
    except (RuntimeError, OSError, ValueError, AttributeError) as error:  # as TVM raises when a device goes away
        said = [line for line in str(error).splitlines() if line.strip()]
        say({"error": f"the device failed or went away: {said[-1] if said else error!r}", "kind": "TargetError"})
    # A session whose device is gone must not be taken down in order: that would talk with the device.
    answers.flush()
    os._exit(0)


def _session(request: dict[str, Any], commands: TextIO, tell: Callable[[str], object]) -> Iterator[dict[str, Any]]:
    environment.tvm()
    from qsparse_export.runtimes.tvm.machine import threads_of, use_threads
    from qsparse_export.runtimes.tvm.tracker import Tracker

    address = Tracker.parse(request["tracker"], request["key"]).request(request["wait_s"])
    remote = address.connect(request["timeout_s"])
    yield {"address": f"{address.host}:{address.port}", "threads": threads_of(remote)}
    bundle = Bundle.load(request["bundle"], check=False)  # checked by the process that started this one
    if not commands.readline():  # the devices are measured one after the other: this one's turn has come
        return
    model = _Model(bundle, remote, tell)
    yield {"opened": True}
    for line in commands:
        command = json.loads(line)
        if "threads" in command:
            use_threads(remote, command["threads"])
            yield {"threads": command["threads"]}
        elif "choose" in command:
            yield {"chosen": model.choose(command["choose"])}
        elif "prefill" in command:
            yield {"samples_s": model.prefill(command["prefill"], command["repetitions"])}
        elif "generate" in command:
            yield {"samples_s": model.generate(command["generate"], command["repetitions"], tell)}
        else:
            yield {"native_calls": model.native_calls()}


class _Model:
    """The bundle, open on the device."""

    def __init__(self, bundle: Bundle, remote: Any, tell: Callable[[str], object]) -> None:
        from qsparse_export.runtimes.tvm.runtime import TvmRuntime

        def on_bytes(sent: int, total: int) -> None:
            tell(f"{sent / 1e6:.1f} of {total / 1e6:.1f} MB")

        self._session, self._machine = TvmRuntime().open_remote(
            bundle.path, remote, str(bundle.manifest["library"]["lanes"]), on_bytes
        )
        self._shape = bundle.decoder_shape()

    def choose(self, ids: Sequence[int]) -> list[int]:
        """The greedy token after each of ``ids``, one after the other from an empty cache."""
        return [token for token, _ in self._steps(ids)]

    def prefill(self, tokens: int, repetitions: int) -> list[list[float]]:
        """Seconds of each repetition."""
        next(Generator(_WithoutLogits(self._session), self._shape).steps(prompt_ids(self._shape.vocab_size, tokens)))
        return [[seconds] for seconds in self._machine.seconds(repetitions)]

    def generate(self, ids: Sequence[int], repetitions: int, tell: Callable[[str], object]) -> list[list[float]]:
        """Seconds of each token of each repetition, fed ``ids`` one after the other from an empty cache."""
        steps = []
        for number, _ in enumerate(self._steps(ids), 1):
            steps.append(self._machine.seconds(repetitions))
            tell(f"token {number} of {len(ids)}")
        return np.transpose(steps).tolist()

    def native_calls(self) -> dict[str, dict[str, int]]:
        """Of the whole session."""
        return self._session.native_calls()

    def _steps(self, ids: Sequence[int]) -> Iterator[tuple[int, int]]:
        """After each run of one token: the greedy one after it, and how many there were."""
        for number, (logits, choose) in enumerate(Generator(self._session, self._shape).steps(ids[:1]), 1):
            yield greedy(logits[-1]), number
            if number < len(ids):
                choose(ids[number])


class _WithoutLogits(SessionView):
    """A session whose logits stay where they are: those of a prompt can be hundreds of megabytes, and nobody reads them."""

    def run(self, feeds: Mapping[str, Any], results: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return super().run(feeds, results) | {"logits": np.zeros((1, 1, 1), np.float32)}

    def to_numpy(self, tensor: Any) -> np.ndarray:
        return tensor if isinstance(tensor, np.ndarray) else super().to_numpy(tensor)


if __name__ == "__main__":
    main()
