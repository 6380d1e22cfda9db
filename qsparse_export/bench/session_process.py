"""The measured side of ``qsparse-bench BUNDLE``: a process of its own that opens one model and times what it is told to.

It imports what running a bundle takes (Python, NumPy, ONNX Runtime or TVM) and nothing else, so that its memory is that of a
program which runs the model. The protocol is one JSON object per line (docs/benchmarks.md): a device's own program that
speaks it is measured just so.

    python -m qsparse_export.bench.session_process '{"bundle": DIR, "graph": FILE or null, "native": true, "threads": 2}'
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from qsparse_export.bench.prompt import first_token, prompt_ids
from qsparse_export.bundle import Bundle
from qsparse_export.errors import QSparseError
from qsparse_export.generate import Generator, greedy
from qsparse_export.runtimes.tvm import environment

_LIBRARIES = {"ort": "onnxruntime", "reference": "onnx.reference"}


def main() -> None:
    """Answers each line of stdin by one line on stdout until stdin ends; what fails is a line too, and the last one."""
    # Whatever a library prints on stdout must not get between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        for answer in _session(json.loads(sys.argv[1]), sys.stdin):
            print(json.dumps(answer), file=answers, flush=True)
    except QSparseError as error:
        print(json.dumps({"error": str(error), "kind": type(error).__name__}), file=answers, flush=True)
    except BrokenPipeError:
        pass  # the process that asked is gone


def _session(request: dict[str, Any], commands: TextIO) -> Iterator[dict[str, Any]]:
    bundle = Bundle.load(request["bundle"], check=False)  # checked by the process that started this one
    shape, model = bundle.decoder_shape(), bundle.manifest["model"]
    runtime = bundle.runtime(native=request["native"])
    _import_runtime(bundle.manifest["runtime"])
    before_load_bytes = peak_rss_bytes()
    start = time.perf_counter()
    session = runtime.open(
        bundle.path,
        threads=request["threads"],
        native=request["native"],
        graph=Path(request["graph"]) if request["graph"] else None,
    )
    load_ms = (time.perf_counter() - start) * 1e3
    generator = Generator(session, shape)
    yield {"load_ms": load_ms, "rss_before_load_bytes": before_load_bytes}
    for line in commands:
        command = json.loads(line)
        if "prefill" in command:
            yield _prefill(generator, prompt_ids(shape.vocab_size, command["prefill"]))
        elif "generate" in command:
            yield {"seconds_per_token": _generate(generator, first_token(model), command["generate"])}
        else:
            yield {"peak_rss_bytes": peak_rss_bytes(), "native_calls": generator.native_calls()}


def _import_runtime(name: str) -> None:
    """What a program imports once is no part of the time that a model takes to load."""
    if name == "tvm":
        environment.tvm()
    else:
        importlib.import_module(_LIBRARIES[name])


def _prefill(generator: Generator, ids: list[int]) -> dict[str, float]:
    start = time.perf_counter()
    logits, _ = next(generator.steps(ids))
    seconds = time.perf_counter() - start
    greedy(logits[-1])
    return {"seconds": seconds, "first_token_seconds": time.perf_counter() - start}


def _generate(generator: Generator, first: int, tokens: int) -> list[float]:
    """Seconds of each of ``tokens`` greedy tokens, from an empty cache: the run of the graph and the choice."""
    seconds: list[float] = []
    start = time.perf_counter()
    for logits, choose in generator.steps([first]):
        token = greedy(logits[-1])
        end = time.perf_counter()
        seconds.append(end - start)
        start = end
        if len(seconds) < tokens:
            choose(token)
    return seconds


def peak_rss_bytes() -> int:
    """The most memory that this process had resident, file-mapped weights included.

    From Linux's VmHWM, which begins anew with the program; ru_maxrss would count the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text("ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    main()
