"""TVM's modules for NVIDIA GPUs, executed on a machine without one: a stand-in for CUDA's libraries runs their kernels.

Machine code cannot run here. What runs in its place is the source that nvcc made it from, compiled for the host with the
emulation of grid, blocks, barriers and warps in tests/cuda. All else is real: the library as it was exported, TVM's
runtime for CUDA, its virtual machine, the order of launches, copies and allocations.

Three steps, each of use without the others::

    stand_in = StandIn(tmp_path)
    monkeypatch.setenv("PATH", stand_in.compiling()["PATH"])  # from now on nvcc keeps what it compiles
    compile_gpu(...)                                          # or any program that has TVM call nvcc
    monkeypatch.undo()
    stand_in.build()                                          # the sources that were kept, for the host
    weights, caches = {"w": w, "x": x}, {"cache": cache}      # arrays by name, on the device from the beginning
    calls = [Call(inputs=("x", "w", "cache"), outputs=("y",), read=("cache",))] * 2
    first, second = stand_in.run(library, {**weights, **caches}, calls)
    first.arrays["y"], first.arrays["cache"], first.launches["ternary_gemv_kernel"], first.counts["host to device"]

``Call.inputs`` are names of arrays, or tuples of integers for parameters that are shapes. Outputs get names too, and
later calls can take them. ``read`` names what is to be read back besides: inputs that the module writes in place.
A program of its own (a session, a command) runs on the stand-in with ``env=stand_in.running()``, TVM being at
``tvm.cuda(0)``.

What it refuses, with StandInError and the reason (the CUDA call fails and TVM raises): an image that nvcc did not make
while sources were kept; arguments that point into freed memory or to no device memory; any access beyond an allocation,
or to the bytes beside it; blocks beyond 1024 threads or what the kernel was compiled for, grids of 0 blocks, more than
48 KiB of shared memory; barriers and exchanges of a warp that some threads miss; misaligned addresses; what a stream may
not do while another one captures. Memory holds NaN and -1 at first. Work of a stream is done when it is enqueued, or
when the graph that has captured it is launched: a missing synchronisation does not show.

Allocations are checked, not the tensors that a module's memory plan puts into one of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from host_kernels import EMULATION, compile_for_host
from stand_in_libraries import DRIVER, HEADERS, RUNTIME, RUNTIME_SOURCES, built_once, link

from qsparse_export.runtimes.tvm.gpu.compile_gpu import find_nvcc

ROOT = Path(__file__).parents[3]
CHILD = Path(__file__).parent / "run_on_stand_in.py"
SOURCES = (*RUNTIME_SOURCES, EMULATION / "stand_in_driver.cc")
KEEP = """#!/bin/sh
# Runs nvcc, and keeps each source that it compiles with what it makes of it.
"{nvcc}" "$@" || exit
while [ $# -gt 0 ]; do
  case "$1" in
    -o) made=$2 ;;
    *.cu) source=$1 ;;
  esac
  shift
done
if [ -n "$made" ] && [ -n "$source" ]; then
  kept=$(mktemp -d "{folder}/kernels-XXXXXX")
  cp "$made" "$kept/image" && cp "$source" "$kept/source.cu"
fi
"""


class StandInError(RuntimeError):
    """What the child process says: TVM's error, with the reason of the stand-in."""


@dataclass(frozen=True)
class Call:
    """``function`` of the module on ``inputs``: names, or shapes. Its results get the names ``outputs``."""

    inputs: tuple[str | tuple[int, ...], ...]
    outputs: tuple[str, ...]
    read: tuple[str, ...] = ()
    function: str = "main"


@dataclass(frozen=True)
class Done:
    """Of one call: ``arrays`` are its outputs and what was to be read. ``counts``: "host to device", "device to host",
    "device to device" (copies), "graphs" (launches of graphs), and each kernel's launches by its name in the source.
    """

    arrays: dict[str, np.ndarray]
    counts: dict[str, int]

    @property
    def launches(self) -> dict[str, int]:
        """By kernel."""
        return {name: count for name, count in self.counts.items() if name.endswith("_kernel")}


@dataclass(frozen=True)
class StandIn:
    """``folder`` keeps sources, images and what is built of them."""

    folder: Path

    def compiling(self, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
        """``environment`` with an nvcc first on the path that keeps what it compiles."""
        program = self.folder / "bin" / "nvcc"
        program.parent.mkdir(exist_ok=True)
        if not program.exists():
            program.write_text(KEEP.format(nvcc=find_nvcc(), folder=self.folder), "utf-8")
            program.chmod(0o755)
        return {**environment, "PATH": f"{program.parent}{os.pathsep}{environment['PATH']}"}

    def build(self) -> None:
        """What was kept and is not yet built, for the host."""
        for source in sorted(self.folder.glob("*/source.cu")):
            library = source.parent / "host.so"
            if not library.exists():
                compile_for_host([source.read_text("utf-8")], library)

    def running(self, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
        """``environment`` of a process in which the stand-in is CUDA."""
        libraries = [str(_libraries()), environment.get("LD_LIBRARY_PATH", "")]
        return {
            **environment,
            "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
            "STAND_IN_KERNELS": str(self.folder),
        }

    def run(self, library: Path, arrays: Mapping[str, np.ndarray], calls: Sequence[Call]) -> list[Done]:
        """The ``calls`` in order, on one virtual machine that has loaded ``library``."""
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            folder = Path(scratch)
            np.savez(folder / "arrays.npz", allow_pickle=False, **dict(arrays))
            (folder / "calls.json").write_text(json.dumps([vars(call) for call in calls]), "utf-8")
            self.python(CHILD, library, folder)
            done = []
            for number in range(len(calls)):
                with np.load(folder / f"{number}.npz") as loaded:
                    counts = json.loads((folder / f"{number}.json").read_text("utf-8"))
                    done.append(Done(dict(loaded), counts))
            return done

    def qsparse_run(self, *arguments: Path | str, **environment: str) -> subprocess.CompletedProcess[str]:
        """The installed command, however it ends; ``environment`` tells the stand-in when to fail (stand_in_runtime.cc)."""
        command = [Path(sys.executable).with_name("qsparse-run"), *map(str, arguments)]
        env = self.running(os.environ | environment)
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)

    def python(self, script: Path, *arguments: Path | str) -> str:
        """What a script prints in a process of its own, with the modules that this process has."""
        command = [sys.executable, "-P", str(script), *map(str, arguments)]
        done = subprocess.run(command, env=self.running(), capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise StandInError(done.stderr[-4000:])
        return done.stdout


def _libraries() -> Path:
    """The folder of the stand-in: one library under both names, so that the driver's half knows the runtime's streams."""
    folder = ROOT / "build" / "tests" / "tvm" / "stand_in"
    with built_once(folder, (*SOURCES, *HEADERS, EMULATION / "emulated_module.h", Path(__file__))) as is_old:
        if is_old:
            link(folder / RUNTIME, SOURCES, [EMULATION], versioned=True)
            (folder / DRIVER).unlink(missing_ok=True)
            (folder / DRIVER).symlink_to(RUNTIME)
    return folder
