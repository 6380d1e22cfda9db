"""A TVM tracker and servers on loopback, in processes of their own: a device farm of one machine."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from qsparse_export.errors import TargetError
from qsparse_export.runtimes.tvm.tracker import Tracker

_PATIENCE_SECONDS = 60
_WITHOUT_TORCH = Path(__file__).parent / "without_torch"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def farm(keys: list[str]) -> Iterator[Tracker]:
    """A tracker with a server for each of ``keys``; the Tracker names the first."""
    with mortal_farm(keys) as (tracker, _):
        yield tracker


@contextlib.contextmanager
def mortal_farm(keys: list[str]) -> Iterator[tuple[Tracker, dict[str, int]]]:
    """As :func:`farm`; with the process group of the server at each "host:port", by which a test ends it."""
    tracker = Tracker("127.0.0.1", free_port(), keys[0])
    groups = {}
    address = f"{tracker.host}:{tracker.port}"
    with contextlib.ExitStack() as running:
        ports = ("--port", str(tracker.port), "--port-end", str(tracker.port + 1))
        running.enter_context(_process("rpc_tracker", "--host", tracker.host, *ports))
        _wait(lambda: _require_listener(tracker))
        for key in keys:
            port = free_port()
            ports = ("--port", str(port), "--port-end", str(port + 1))
            server = _process("rpc_server", "--host", tracker.host, *ports, "--tracker", address, "--key", key)
            groups[f"{tracker.host}:{port}"] = running.enter_context(server)
        for key in set(keys):
            _wait(lambda key=key: _require(Tracker(tracker.host, tracker.port, key), keys.count(key)))
        yield tracker, groups


@contextlib.contextmanager
def _process(module: str, *arguments: str) -> Iterator[int]:
    command = [sys.executable, "-P", "-m", f"tvm.exec.{module}", *arguments]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = os.environ | {"PYTHONPATH": str(_WITHOUT_TORCH)}
    process = subprocess.Popen(command, start_new_session=True, env=environment, **quiet)
    try:
        yield process.pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _require_listener(tracker: Tracker) -> None:
    try:
        socket.create_connection((tracker.host, tracker.port), 1).close()
    except OSError as error:
        raise TargetError("the tracker is not there yet") from error


def _require(tracker: Tracker, count: int) -> None:
    if tracker.require_device() < count:
        raise TargetError("not all servers are there yet")


def _wait(attempt) -> None:
    end = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            attempt()
            return
        except TargetError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)
