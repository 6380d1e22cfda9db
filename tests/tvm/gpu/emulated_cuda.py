"""The CUDA source that TVM emits, compiled for the host with the emulation that the kernels of runtimes/cuda are tested on."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from device_kernels import DeviceKernel, device_kernels
from software_device import missing, sizes_of, tensors_before

from qsparse_export.runtimes.tvm.gpu.program import Program

EMULATION = Path(__file__).parents[2] / "cuda"
C_TYPES = {
    "float32": "float",
    "float16": "half",
    "int32": "int",
    "int64": "int64_t",
    "uint32": "uint",
    "uint16": "ushort",
    "uint8": "uchar",
    "bool": "bool",
}
SHUFFLED = 2
"""The order in which threads run until they meet a barrier: 0 ascending, 1 descending, else the seed of a shuffle."""
PRELUDE = """
#include <algorithm>
#include <cmath>
#include "emulation.h"
#define __host__
#define __align__(bytes) __attribute__((aligned(bytes)))
using half = _Float16;
using __half = half;
inline bool __hgt(half a, half b) { return a > b; }
inline bool __hlt(half a, half b) { return a < b; }
inline half __float2half_rn(float value) { return static_cast<half>(value); }
struct __half2 {};
using std::max, std::min;
// Threads are fibers of one thread of the process: one block at a time has what is static.
#define __shared__ static
// Standard attributes may not stand behind it, where nvcc takes them.
#define alignas(bytes) __attribute__((aligned(bytes)))
"""


@dataclass(frozen=True)
class EmulatedCuda:
    """``compiler`` is g++."""

    compiler: str

    @staticmethod
    def open() -> EmulatedCuda:
        """Fails the test where there is no compiler."""
        compiler = shutil.which("g++")
        if compiler is None:
            pytest.fail(missing("g++", "it is not on the path", ["apt-get install g++"]), pytrace=False)
        return EmulatedCuda(compiler)

    def run(self, program: Program, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tensors = tensors_before(program, inputs)
        tensors = {name: tensor.copy() for name, tensor in tensors.items()}
        dtypes = {name: str(buffer.dtype) for name, buffer in program.buffers().items()}
        kernels = device_kernels(program, "cuda")
        with tempfile.TemporaryDirectory() as folder:
            library = self._compiled(Path(folder), [_source(kernel, dtypes) for kernel in kernels])
        library.emulated_set_order(SHUFFLED)
        for kernel in kernels:
            launch = kernel.launch(sizes_of(program, inputs))
            pointers = [tensors[each].ctypes.data for each in launch.arguments if isinstance(each, str)]
            numbers = [each for each in launch.arguments if isinstance(each, int)]
            getattr(library, f"run_{kernel.name}")(
                (ctypes.c_void_p * len(pointers))(*pointers),
                (ctypes.c_int * max(len(numbers), 1))(*numbers),
                launch.blocks_x,
                launch.blocks_y,
                launch.threads,
            )
        library.emulated_take_failure.restype = ctypes.c_char_p
        failure = library.emulated_take_failure().decode()
        assert failure == "", failure
        return tensors

    def _compiled(self, folder: Path, sources: list[str]) -> ctypes.CDLL:
        for header in ("cuda.h", "cuda_fp16.h"):  # which TVM's source includes: the prelude has what it uses of them
            (folder / header).touch()
        paths = [EMULATION / "emulation.cc"]
        for number, source in enumerate(sources):
            paths.append(folder / f"kernel{number}.cc")
            paths[-1].write_text(source, "utf-8")
        library = folder / "kernels.so"
        flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-w", "-fPIC", "-shared", f"-I{folder}", f"-I{EMULATION}"]
        flags.append("-Wl,--allow-multiple-definition")  # TVM's functions for float16, the same in every source
        command = [self.compiler, *flags, "-o", str(library), *map(str, paths)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return ctypes.CDLL(str(library))


def _source(kernel: DeviceKernel, dtypes: dict[str, str]) -> str:
    """The kernel, and a function that runs its grid."""
    arguments, pointers, numbers = [], 0, 0
    for each in kernel.arguments:
        if isinstance(each, str):
            arguments.append(f"static_cast<{C_TYPES[dtypes[each]]}*>(pointers[{pointers}])")
            pointers += 1
        else:
            arguments.append(f"numbers[{numbers}]")
            numbers += 1
    call = f"{kernel.name}({', '.join(arguments)})"
    signature = f"void run_{kernel.name}(void** pointers, const int* numbers, int x, int y, int threads)"
    body = f"emulated::run_grid(dim3(x, y), threads, [=] {{ {call}; }});"
    return f'{PRELUDE}{kernel.source}\nextern "C" {signature} {{ {body} }}\n'
