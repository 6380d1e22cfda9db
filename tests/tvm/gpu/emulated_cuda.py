"""The CUDA source that TVM emits, compiled for the host with the emulation that the kernels of runtimes/cuda are tested on."""

from __future__ import annotations

import ctypes
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from device_kernels import device_kernels
from host_kernels import HostKernels, compile_for_host
from software_device import missing, sizes_of, tensors_before

from qsparse_export.runtimes.tvm.gpu.program import Program


@dataclass(frozen=True)
class EmulatedCuda:
    """Has a compiler."""

    @staticmethod
    def open() -> EmulatedCuda:
        """Fails the test where there is no compiler."""
        if shutil.which("g++") is None:
            pytest.fail(missing("g++", "it is not on the path", ["apt-get install g++"]), pytrace=False)
        return EmulatedCuda()

    def run(self, program: Program, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tensors = tensors_before(program, inputs)
        tensors = {name: tensor.copy() for name, tensor in tensors.items()}
        kernels = device_kernels(program, "cuda")
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "kernels.so"
            compile_for_host([kernel.source for kernel in kernels], library)
            host = HostKernels.load(library)
        for kernel in kernels:
            launch = kernel.launch(sizes_of(program, inputs))
            values: list[ctypes.c_void_p | ctypes.c_int] = [
                ctypes.c_void_p(tensors[each].ctypes.data) if isinstance(each, str) else ctypes.c_int(each)
                for each in launch.arguments
            ]
            failure = host.launch(kernel.name, (launch.blocks_x, launch.blocks_y, 1), launch.threads, values)
            assert failure == "", failure
        return tensors
