"""The CUDA source that TVM emits -> a library for the host, in which its kernels are found by name and run on the emulation.

The emulation is the one that the kernels of runtimes/cuda are tested on (tests/cuda/emulation.h).
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kernel_runs import tool
from stand_in_libraries import built_once

ROOT, HERE = Path(__file__).parents[3], Path(__file__).parent
EMULATION = HERE.parents[1] / "cuda"
HEADERS = ("cuda.h", "cuda_fp16.h")
"""Which TVM's source includes: tvm_cuda.h has what it uses of them."""
FLAGS = (
    "-std=c++17",
    "-O0",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fsanitize=alignment",
    "-fno-sanitize-recover=alignment",
    "-w",
    "-fPIC",
    f"-I{EMULATION}",
    f"-I{HERE}",
)
_KERNEL = re.compile(r'^extern "C" __global__ void (?:__launch_bounds__\((\d+)\) )?(\w+)\([^;{]*\) \{', re.MULTILINE)
_DYNAMIC = re.compile(r"^ *extern __shared__ [^;]*?(\w+) buf_dyn_shmem\[\];", re.MULTILINE)


SHUFFLED = 2
"""The order in which threads run until they meet a barrier: 0 ascending, 1 descending, else the seed of a shuffle."""


@dataclass(frozen=True)
class HostKernels:
    """What :func:`compile_for_host` writes, loaded."""

    handle: ctypes.CDLL

    @staticmethod
    def load(library: Path) -> HostKernels:
        """Also what is deleted afterwards."""
        handle = ctypes.CDLL(str(library))
        handle.emulated_find.restype = ctypes.c_void_p
        handle.emulated_launch.restype = ctypes.c_char_p
        handle.emulated_set_order(SHUFFLED)
        return HostKernels(handle)

    def launch(
        self, name: str, blocks: tuple[int, int, int], threads: int, values: Sequence[ctypes.c_void_p | ctypes.c_int]
    ) -> str:
        """Runs the grid; the failure, "" for none."""
        kernel = self.handle.emulated_find(name.encode())
        assert kernel, name
        three = ctypes.c_uint * 3
        addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        return self.handle.emulated_launch(
            ctypes.c_void_p(kernel), three(*blocks), three(threads, 1, 1), ctypes.c_size_t(0), addresses
        ).decode()


def host_source(source: str, first: int = 0) -> str:
    """``source`` with what makes it compile for the host; its kernels are numbers ``first`` and up of a library."""
    parts, at, registered = ['#include "tvm_cuda.h"\n'], 0, []
    for number, found in enumerate(_KERNEL.finditer(source), first):
        shared = f"#undef __shared__\n#define __shared__ QSK_SHARED_VARIABLE({number})\n"
        parts += [source[at : found.start()], shared]
        at = found.start()
        registered.append(f"QSK_REGISTER({found[2]}, {found[1] or 0}, {number})\n")
    whole = "".join([*parts, source[at:], "\n", *registered])
    return _DYNAMIC.sub(r"auto* buf_dyn_shmem = reinterpret_cast<\1*>(emulated::dynamic_shared());", whole)


def compile_for_host(sources: Sequence[str], library: Path) -> None:
    """Write ``library``, with all kernels of ``sources``; AssertionError with the compiler's message."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for header in HEADERS:
            (folder / header).touch()
        paths, first = _emulation(), 0
        for number, source in enumerate(sources):
            paths.append(folder / f"kernels{number}.cc")
            paths[-1].write_text(host_source(source, first), "utf-8")
            first += len(_KERNEL.findall(source))
        # TVM's functions for float16 are the same in every source.
        _compile("-shared", f"-I{folder}", "-Wl,--allow-multiple-definition", "-o", str(library), *map(str, paths))


def _emulation() -> list[Path]:
    """Compiled once."""
    folder = ROOT / "build" / "tests" / "tvm" / "emulation"
    sources = [EMULATION / "emulation.cc", EMULATION / "emulated_module.cc"]
    objects = [folder / f"{source.stem}.o" for source in sources]
    with built_once(folder, (*sources, *EMULATION.glob("emulat*.h"), Path(__file__))) as is_old:
        for source, made in zip(sources, objects, strict=True):
            if is_old:
                _compile("-c", "-o", str(made), str(source))
    return objects


def _compile(*arguments: str) -> None:
    command = [tool("g++", "g++ (apt-get install g++)"), *FLAGS, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
