"""The CUDA kernels compiled for the host, with emulation.h in place of CUDA, and calls of them in guarded memory."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import re
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
from compiled_kernels import kernels_in_sources
from kernel_call import Call, Case
from kernel_runs import tool

from qsparse_export.runtimes.ort.library import library_path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
KERNELS = ROOT / "runtimes" / "cuda"
INCLUDES = (KERNELS, ROOT / "runtimes" / "kernels" / "include")
SCRATCH_ALIGNMENT = 64
WORD = 4
"""Alignment in bytes that the kernels ask of weights; no array is aligned better."""


def build_emulated() -> Path:
    """The library of all kernels and of the test's own broken ones."""
    sources = [HERE / "emulation.cc", KERNELS / "steps.cc", HERE / "broken_kernels.cu", *sorted(KERNELS.glob("*.cu"))]
    # No fused multiply-adds: the integer parts are exact, and what the kernels round is written out. Signed overflow,
    # misaligned access and the like end the process.
    flags = ["-O2", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    return build_library("libemulated.so", sources, [*flags, "-fsanitize=undefined", "-fno-sanitize-recover=undefined"])


def build_emulated_ort(with_cpu_ops: bool) -> Path:
    """libqsparse_ort_cuda with the emulated kernels: its CUDA ops alone, given to the CPU provider, or as they are, with
    some of the CPU's.
    """
    native, headers = library_path(), library_path().parent / "source" / "include" / "onnxruntime"
    folder = ROOT / "runtimes" / "ort"
    shared = ["api", "calls", "huge_pages", "op_kernel", "custom_ops"] + (
        ["topk_ops", "ternary_ops", "head_ops"] if with_cpu_ops else []
    )
    sources = [KERNELS / "ort_ops.cc", HERE / "no_cpu_ops.cc", *(folder / f"{name}.cc" for name in shared)]
    flags = ["-O0", "-DQSPARSE_WITH_CUDA", f"-I{folder}", f"-isystem{headers}"]
    for library in (native, build_emulated()):  # the CPU kernels and the emulated ones
        flags += [f"-L{library.parent}", f"-Wl,-rpath,{library.parent}", f"-l:{library.name}"]
    if with_cpu_ops:
        return build_library("libemulated_ort.so", sources, flags)
    return build_library("libemulated_ort_on_cpu.so", sources, [*flags, "-DQSPARSE_CUDA_PROVIDER=nullptr"])


def build_library(name: str, sources: list[Path], more_flags: list[str]) -> Path:
    """Compiled from ``sources``, as C++ whatever their names; again when a source or header is newer."""
    folders = (HERE, KERNELS, INCLUDES[1] / "qsk", ROOT / "runtimes" / "ort")
    headers = [header for folder in folders for header in folder.glob("*.h")]
    library = ROOT / "build" / "tests" / "cuda" / name
    library.parent.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++17", "-fPIC", "-shared", *(f"-I{folder}" for folder in (HERE, *INCLUDES))]
    compiler = tool("g++", "g++ (apt-get install g++)")
    command = [compiler, *flags, "-o", str(library), "-x", "c++", *map(str, sources), "-x", "none", *more_flags]
    with (library.parent / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        newest = max(path.stat().st_mtime for path in (*sources, *headers, Path(__file__)))
        if not library.exists() or library.stat().st_mtime < newest:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                pytest.fail(f"{' '.join(command)}\n{done.stderr[-4000:]}", pytrace=False)
    return library


class Guarded:
    """A copy of an array right before a page that cannot be touched: a read beyond its end ends the process."""

    def __init__(self, array: np.ndarray, alignment: int) -> None:
        pages = -(-(array.nbytes + alignment) // mmap.PAGESIZE) * mmap.PAGESIZE
        self._memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
        begin = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        if libc.mprotect(begin + pages, mmap.PAGESIZE, 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
        offset = (pages - array.nbytes) // alignment * alignment
        self.address = begin + offset
        self.array = np.frombuffer(self._memory, array.dtype, array.size, offset).reshape(array.shape)
        self.array[...] = array


class Queue(ctypes.Structure):
    """qsk_cuda_queue."""

    _fields_ = (("stream", ctypes.c_void_p), ("multiprocessors", ctypes.c_int64))


@dataclass(frozen=True)
class EmulatedKernels:
    """The C ABI of qsk_cuda.h on the emulation. ``order`` of the threads: 0 ascending, 1 descending, else shuffled."""

    handle: ctypes.CDLL

    def status(self, call: Call, multiprocessors: int = 4, order: int = 0, scratch_bytes: int | None = None) -> int:
        """Makes the call and returns its status; its outputs are written. Asserts what emulation.h watches."""
        outputs = {}
        for name, array in call.inputs.items():
            guarded = Guarded(array, max(array.itemsize, WORD))
            call.inputs[name] = guarded.array  # keeps it alive
            setattr(call.args, name, guarded.address)
        for name, array in call.outputs.items():
            outputs[name] = Guarded(array, max(array.itemsize, WORD))
            setattr(call.args, name, outputs[name].address)
        name = call.function.replace("qsk_", "qsk_cuda_")
        needed, function = getattr(self.handle, f"{name}_scratch_bytes"), getattr(self.handle, name)
        needed.restype = ctypes.c_int64
        function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64]
        queue = Queue(None, multiprocessors)
        if scratch_bytes is None:
            scratch_bytes = needed(ctypes.byref(call.args), ctypes.byref(queue))
        scratch = Guarded(np.full(scratch_bytes, 0xA5, np.uint8), SCRATCH_ALIGNMENT)
        self.handle.emulated_set_order(order)
        status = function(ctypes.byref(call.args), ctypes.byref(queue), scratch.address, scratch_bytes)
        for name, array in call.outputs.items():
            array[...] = outputs[name].array
        failure = self.take_failure()
        assert failure == "", failure
        return status

    def take_failure(self) -> str:
        """What the emulation found wrong since the last time it was asked for."""
        take = self.handle.emulated_take_failure
        take.restype = ctypes.c_char_p
        return take().decode()

    @cached_property
    def instances(self) -> dict[int, str]:
        """Every kernel of every type, such as "nbits_gemv<4, float>", by its address in the library."""
        nm = [tool("nm", "binutils"), "-C", self.handle._name]
        listed = subprocess.run(nm, capture_output=True, text=True, check=True).stdout
        names = "|".join(sorted(kernels_in_sources()))
        symbol = rf"^([0-9a-f]+) t (?:void )?qsk_cuda::\(anonymous namespace\)::((?:{names})(?:<[^(]*>)?)\([^\[\n]*$"
        return {int(address, 16): name for address, name in re.findall(symbol, listed, re.MULTILINE)}

    def take_launched(self) -> set[str]:
        """Those that were launched since the last time, but for the test's own broken ones."""
        take = self.handle.emulated_take_launched
        take.restype = ctypes.c_char_p
        addresses = {int(number, 16) for number in take().split()}
        return {name for address, name in self.instances.items() if address in addresses}

    def check(self, case: Case, multiprocessors: int = 4, order: int = 0) -> float:
        """Runs one case and compares it with its reference: the largest error, as a share of what is allowed."""
        call = case.call()
        assert self.status(call, multiprocessors, order) == 0, case
        return case.check(*call.outputs.values())
