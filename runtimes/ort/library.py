"""Finds the native custom-op library and reads what it knows: its version, kernel variants and call counts.

ONNX Runtime loads the same file by its path (``SessionOptions.register_custom_ops_library``); the counts are those of
this process, over all sessions. A bundle's copy of the library is another file and counts for itself.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from qsparse_export.errors import TargetError

LIBRARY_NAME = "libqsparse_ort.so"
CUDA_LIBRARY_NAME = "libqsparse_ort_cuda.so"
DEVICE_BENCH_NAME = "qsparse-device-bench"
FORCE_VARIABLE = "QSPARSE_VARIANT"


@dataclass(frozen=True)
class Library:
    """One loaded custom-op library.

    ``variants`` are the kernel variants that it knows, ``supported`` those that this machine can run, both from the
    slowest to the fastest; ``ops`` are the operators that it registers in the domain ``ai.qsparse``.
    """

    path: Path
    version: str
    ops: tuple[str, ...]
    variants: tuple[str, ...]
    supported: tuple[str, ...]
    handle: ctypes.CDLL

    def chosen(self) -> str:
        """The variant that kernels created now would use; TargetError when QSPARSE_VARIANT forces an impossible one."""
        variant = ctypes.c_void_p()
        status = self.handle.qsk_variant_choose(ctypes.byref(variant))
        if status != 0:
            raise TargetError(_text(self.handle.qsk_variant_explain, status))
        return self.handle.qsk_variant_name(variant).decode()

    def calls(self) -> dict[str, dict[str, int]]:
        """Calls since the last reset: ``{op: {variant: count}}``, without zeros."""
        return json.loads(_text(self.handle.qsparse_ort_calls))

    def huge_page_bytes(self) -> int:
        """Bytes of weights that all sessions of this process hold in huge pages."""
        return self.handle.qsparse_ort_huge_page_bytes()

    def reset_calls(self) -> None:
        """Set all counts to zero."""
        self.handle.qsparse_ort_reset_calls()


def library_path() -> Path:
    """The library built with this package; TargetError when this installation has none."""
    path = Path(str(files("qsparse_export.runtimes.ort").joinpath(LIBRARY_NAME)))
    if not path.is_file():
        raise TargetError(
            f"{LIBRARY_NAME} is not part of this installation; install the package with a C++ compiler present "
            "(pip install .), or run on the function bodies only"
        )
    return path


def source_folder() -> Path:
    """The C++ sources that the library was built from, with ONNX Runtime's headers; TargetError where there are none."""
    folder = library_path().parent / "source"
    if not (folder / "CMakeLists.txt").is_file():
        raise TargetError(f"{folder} with the kernels' sources is missing; install the package again (pip install .)")
    return folder


def device_bench_path() -> Path:
    """The benchmark program for this machine; TargetError where this installation has none."""
    path = library_path().parent / DEVICE_BENCH_NAME
    if not path.is_file():
        raise TargetError(f"{DEVICE_BENCH_NAME} is not part of this installation; install the package again")
    return path


def needed_glibc(file: Path) -> str:
    """The newest version of the GNU C library that a program or library asks for, such as "2.34"; empty when none."""
    asked = re.findall(rb"GLIBC_([0-9]+)\.([0-9]+)", file.read_bytes())
    return ".".join(map(str, max((int(major), int(minor)) for major, minor in asked))) if asked else ""


def open_library(path: Path | str | None = None) -> Library:
    """Load ``path``, by default the package's own library; TargetError when it cannot be loaded or is another one."""
    chosen = library_path() if path is None else Path(os.path.realpath(path))
    try:
        handle = ctypes.CDLL(str(chosen))
        _declare(handle)
    except (OSError, AttributeError) as error:
        raise TargetError(f"{chosen} cannot be used as the kernel library: {error}") from error
    pointers = [handle.qsk_variant_at(i) for i in range(handle.qsk_variant_count())]
    names = [handle.qsk_variant_name(pointer).decode() for pointer in pointers]
    supported = [name for name, p in zip(names, pointers, strict=True) if handle.qsk_variant_is_supported(p)]
    return Library(
        path=chosen,
        version=handle.qsk_version().decode(),
        ops=tuple(handle.qsparse_ort_ops().decode().split()),
        variants=tuple(names),
        supported=tuple(supported),
        handle=handle,
    )


def _declare(handle: ctypes.CDLL) -> None:
    signatures: dict[str, tuple[type | None, list[type]]] = {
        "qsk_version": (ctypes.c_char_p, []),
        "qsk_variant_count": (ctypes.c_int64, []),
        "qsk_variant_at": (ctypes.c_void_p, [ctypes.c_int64]),
        "qsk_variant_name": (ctypes.c_char_p, [ctypes.c_void_p]),
        "qsk_variant_is_supported": (ctypes.c_int, [ctypes.c_void_p]),
        "qsk_variant_choose": (ctypes.c_int, [ctypes.c_void_p]),
        "qsk_variant_explain": (ctypes.c_int64, [ctypes.c_int, ctypes.c_char_p, ctypes.c_int64]),
        "qsparse_ort_ops": (ctypes.c_char_p, []),
        "qsparse_ort_huge_page_bytes": (ctypes.c_int64, []),
        "qsparse_ort_calls": (ctypes.c_int64, [ctypes.c_char_p, ctypes.c_int64]),
        "qsparse_ort_reset_calls": (None, []),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(handle, name)
        function.restype = result
        function.argtypes = arguments


def _text(function: ctypes._NamedFuncPointer, *arguments: int) -> str:
    """What a C function writes into ``(buffer, capacity)``; it returns the bytes that the whole text takes."""
    capacity = 4096
    while True:
        buffer = ctypes.create_string_buffer(capacity)
        needed = function(*arguments, buffer, capacity)
        if needed <= capacity:
            return buffer.value.decode()
        capacity = needed
