"""Two ways to run kernel cases: the library in this process, and a runner program of another build."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from kernel_call import Call, Case

from qsparse_export.runtimes.ort.library import Library

ROOT = Path(__file__).resolve().parents[2]
BUILDS = ROOT / "build" / "tests"


class _Parallel(ctypes.Structure):
    _fields_ = (("context", ctypes.c_void_p), ("run", ctypes.c_void_p), ("workers", ctypes.c_int64))


TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)
RUN = ctypes.CFUNCTYPE(None, ctypes.c_void_p, TASK, ctypes.c_void_p, ctypes.c_int64)


def _run_threads(_context: int, task: Callable[[int, int], None], argument: int, count: int) -> None:
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(lambda i: task(argument, i), range(count)))


_RUN = RUN(_run_threads)


def aligned(byte_count: int) -> np.ndarray:
    memory = np.full(byte_count + 64, 0xA5, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + byte_count]


@dataclass(frozen=True)
class Kernels:
    """The C ABI of the library in this process."""

    library: Library

    def status(self, call: Call, variant: str = "generic", scratch_bytes: int | None = None) -> int:
        """Makes the call and returns its status; its outputs are written."""
        for name, array in (*call.inputs.items(), *call.outputs.items()):
            setattr(call.args, name, array.ctypes.data)
        handle = self.library.handle
        needed, function = getattr(handle, f"{call.function}_scratch_bytes"), getattr(handle, call.function)
        needed.restype = ctypes.c_int64
        function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64]
        parallel = _Parallel(None, ctypes.cast(_RUN, ctypes.c_void_p), call.workers)
        if scratch_bytes is None:
            scratch_bytes = needed(ctypes.byref(call.args), ctypes.byref(parallel))
        scratch = aligned(max(scratch_bytes, 0))
        handle.qsk_variant_by_name.restype = ctypes.c_void_p
        pointer = handle.qsk_variant_by_name(variant.encode())
        arguments = (ctypes.byref(call.args), ctypes.byref(parallel), scratch.ctypes.data, scratch_bytes)
        return function(pointer, *arguments)

    def run(self, variant: str, case: Case) -> tuple[np.ndarray, ...]:
        call = case.call()
        assert self.status(call, variant) == 0, case
        return tuple(call.outputs.values())

    def check(self, variant: str, case: Case) -> float:
        return case.check(*self.run(variant, case))


def tool(name: str, package: str) -> str:
    """A program from the environment of this Python or the path; fails with what to install."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.fail(f"{name} is missing, which this test needs: install {package}", pytrace=False)
    return found


def _spell(call: Call) -> bytes:
    """What runner.cc reads; pointers are left for it to set."""

    def offset(name: str) -> int:
        return getattr(type(call.args), name).offset

    name, args = call.function.encode(), bytes(call.args)
    parts = [struct.pack("<q", len(name)), name, struct.pack("<q", len(args)), args]
    parts.append(struct.pack("<2q", call.workers, len(call.inputs)))
    for field, array in call.inputs.items():
        parts += [struct.pack("<2q", offset(field), array.nbytes), array.tobytes()]
    parts.append(struct.pack("<q", len(call.outputs)))
    parts += [struct.pack("<2q", offset(field), array.nbytes) for field, array in call.outputs.items()]
    return b"".join(parts)


@dataclass(frozen=True)
class Checked:
    """Calls that took more than one thread, and the largest error as a share of what is allowed."""

    threaded: int
    error_share: float


@dataclass(frozen=True)
class Runner:
    """qsk_runner of one build, with what must come before it on a command line."""

    program: Path
    prefix: tuple[str, ...] = ()

    def start(self, *arguments: str, variant: str = "") -> subprocess.CompletedProcess[str]:
        environment = dict(os.environ, QSPARSE_VARIANT=variant)
        command = [*self.prefix, str(self.program), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)

    def variants(self, variant: str = "") -> tuple[str, list[str]]:
        """The chosen variant and all supported ones."""
        done = self.start("--variants", variant=variant)
        assert done.returncode == 0, done.stderr
        chosen, supported = done.stdout.splitlines()
        return chosen.split()[1], supported.split()[1:]

    def check(self, variant: str, cases: Sequence[Case], folder: Path) -> Checked:
        """Run the cases with a forced variant and compare every result with its reference."""
        inputs, results = folder / f"{variant}.calls", folder / f"{variant}.results"
        calls = [case.call() for case in cases]
        with inputs.open("wb") as file:
            file.writelines(map(_spell, calls))
        done = self.start(str(inputs), str(results), variant=variant)
        assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}{done.stderr}"
        content = results.read_bytes()
        offset, threaded, share = 0, 0, 0.0

        def take(shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
            nonlocal offset
            array = np.frombuffer(content, dtype, int(np.prod(shape)), offset).reshape(shape)
            offset += array.nbytes
            return array

        for case, call in zip(cases, calls, strict=True):
            status, threads = take((2,), np.int64)
            assert status == 0, case
            threaded += threads > 1
            found = case.check(*(take(output.shape, output.dtype) for output in call.outputs.values()))
            share = max(share, found)
        assert offset == len(content)
        return Checked(threaded, share)


def build_runner(name: str, *options: str) -> Path:
    """Configure and build qsk_runner in build/tests/<name>; later calls only rebuild what changed."""
    folder = BUILDS / name
    folder.mkdir(parents=True, exist_ok=True)
    cmake = tool("cmake", "cmake (pip install cmake)")
    configure = [cmake, "-S", str(ROOT), "-B", str(folder), "-DQSK_BUILD_ORT=OFF", "-DQSK_BUILD_RUNNER=ON", *options]
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, [cmake, "--build", str(folder), "--parallel", "2"]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                pytest.fail(f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}", pytrace=False)
    return folder / "tests" / "kernels" / "qsk_runner"
