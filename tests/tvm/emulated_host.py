"""PrimFuncs compiled for an ARM processor, linked to a library of their own, and run under qemu by host.cc."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tvm
import tvm_ffi.libinfo

COMPILER = "aarch64-linux-gnu-g++"
SYSROOT = "/usr/aarch64-linux-gnu"
_TYPE_CODES = {"i": 0, "u": 1, "f": 2, "b": 6}
"""DLPack's."""


@dataclass(frozen=True)
class HostCall:
    """A PrimFunc, its inputs and the shape of its float32 result."""

    prim_func: tvm.tirx.PrimFunc
    inputs: tuple[np.ndarray, ...]
    shape: tuple[int, ...]


def tool(name: str, package: str) -> str:
    found = shutil.which(name)
    assert found, f"{name} is missing: install {package}"
    return found


def build_host(folder: Path) -> Path:
    """host.cc for aarch64."""
    includes = [tvm_ffi.libinfo.find_include_path(), tvm_ffi.libinfo.find_dlpack_include_path()]
    includes.append(str(Path(tvm.__file__).parent / "include"))
    flags = [f"-I{path}" for path in includes]
    source = Path(__file__).with_name("host.cc")
    output = folder / "host"
    command = [tool(COMPILER, "g++-aarch64-linux-gnu (apt)"), "-std=c++17", "-O1", "-rdynamic", *flags, str(source)]
    subprocess.run([*command, "-o", str(output), "-ldl", "-lpthread"], check=True)
    return output


def build_library(calls: Sequence[HostCall], features: Sequence[str], folder: Path) -> Path:
    """All functions in one library, which needs no TVM."""
    functions = {
        f"kernel_{i}": call.prim_func.with_attr("global_symbol", f"kernel_{i}") for i, call in enumerate(calls)
    }
    target = tvm.target.Target(
        {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": [f"+{feature}" for feature in features]}
    )
    compiled = tvm.compile(tvm.IRModule(functions), target=target)
    compiled.mod.write_to_file(str(folder / "kernels.o"), "o")
    library = folder / "libkernels.so"
    subprocess.run([COMPILER, "-shared", str(folder / "kernels.o"), "-o", str(library)], check=True)
    return library


def tensor_bytes(array: np.ndarray) -> bytes:
    """A tensor as the C++ programs read it: DLPack's type code, bits, number of dimensions, dimensions and values."""
    header = (_TYPE_CODES[array.dtype.kind], 8 * array.dtype.itemsize, array.ndim, *array.shape)
    return struct.pack(f"<3i{array.ndim}q", *header) + np.ascontiguousarray(array).tobytes()


def run(
    host: Path, library: Path, calls: Sequence[HostCall], cpu: str, folder: Path
) -> subprocess.CompletedProcess[str]:
    """Makes the calls on the emulated ``cpu``; :func:`results` reads what they wrote."""
    with (folder / "calls").open("wb") as file:
        for i, call in enumerate(calls):
            name = f"kernel_{i}".encode()
            file.write(struct.pack("<i", len(name)) + name + struct.pack("<i", len(call.inputs) + 1))
            for array in (*call.inputs, np.full(call.shape, np.nan, np.float32)):
                file.write(tensor_bytes(array))
    command = [tool("qemu-aarch64", "qemu-user (apt)"), "-L", SYSROOT, "-cpu", cpu, str(host), str(library)]
    return subprocess.run(
        [*command, str(folder / "calls"), str(folder / "results")], capture_output=True, text=True, check=False
    )


def results(calls: Sequence[HostCall], folder: Path) -> list[np.ndarray]:
    """What each call of :func:`run` wrote."""
    values = np.fromfile(folder / "results", np.float32)
    ends = np.cumsum([int(np.prod(call.shape)) for call in calls])
    assert len(values) == ends[-1]
    parts = np.split(values, ends[:-1])
    return [part.reshape(call.shape) for part, call in zip(parts, calls, strict=True)]
