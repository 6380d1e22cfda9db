"""The machine: what it is, and how fast it reads memory as a sparse kernel does."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qsparse_export.errors import TargetError
from qsparse_export.runtimes.ort.library import Library


@dataclass(frozen=True)
class Reading:
    """How the probe reads rows: ``together`` in turns, line by line, and prefetching the row ``ahead`` (0: none)."""

    ahead: int
    together: int = 1


READINGS = (Reading(0), Reading(2), Reading(8), Reading(0, together=4), Reading(0, together=8), Reading(8, together=8))
"""What is tried; the fastest is the machine's limit."""


def describe(library: Library | None) -> dict[str, Any]:
    """Processor, cores, memory, system, last-level cache and versions, as plain values; None: no kernels ran."""
    import onnxruntime

    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "last_level_cache_bytes": _last_level_cache_bytes(),
        "memory_bytes": _memory_bytes(),
        "supported_variants": list(library.supported) if library else [],
        "library": library.version if library else None,
        "onnxruntime": onnxruntime.__version__,
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text("utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _last_level_cache_bytes() -> int | None:
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    found = [size.read_text("utf-8").strip() for size in sizes]
    return max((int(text[:-1]) << {"K": 10, "M": 20}[text[-1]] for text in found if text[-1:] in "KM"), default=None)


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # not on this system
        return None


class _ProbeArgs(ctypes.Structure):
    _fields_ = (
        ("base", ctypes.c_void_p),
        ("row_bytes", ctypes.c_int64),
        ("index", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("ahead", ctypes.c_int64),
        ("together", ctypes.c_int64),
    )


class _Parallel(ctypes.Structure):
    _fields_ = (("context", ctypes.c_void_p), ("run", ctypes.c_void_p), ("workers", ctypes.c_int64))


_TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)
_RUN = ctypes.CFUNCTYPE(None, ctypes.c_void_p, _TASK, ctypes.c_void_p, ctypes.c_int64)


class Probe:
    """Reads rows of a byte array through the kernel library on ``threads`` threads.

    A call costs some 0.1 ms of Python where threads > 1: read megabytes at a time.
    """

    def __init__(self, library: Library, threads: int) -> None:
        self._function = library.handle.qsk_probe_read
        self._function.restype = ctypes.c_int
        self._function.argtypes = [ctypes.c_void_p] * 3
        self._pool = ThreadPoolExecutor(threads)

        def run(_context: int, task: Callable[[int, int], None], argument: int, count: int) -> None:
            for done in [self._pool.submit(task, argument, i) for i in range(count)]:
                done.result()

        self._callback = _RUN(run)  # kept alive as long as the library may call it
        self._parallel = _Parallel(None, ctypes.cast(self._callback, ctypes.c_void_p), threads)

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown()

    def read(self, rows: np.ndarray, index: np.ndarray, reading: Reading) -> int:
        """The sum of the 64-bit words, modulo 2**64, of ``rows[index]``; rows uint8 [R, bytes], index int64 [count]."""
        args = _ProbeArgs(
            rows.ctypes.data, rows.shape[1], index.ctypes.data, len(index), reading.ahead, reading.together
        )
        total = ctypes.c_uint64()
        status = self._function(ctypes.byref(args), ctypes.byref(self._parallel), ctypes.byref(total))
        if status != 0:
            raise TargetError(f"the bandwidth probe refused rows of {rows.shape[1]} bytes (status {status})")
        return total.value
