"""PoCL: OpenCL with real work-groups and barriers on this machine's CPU (``pip install 'pyopencl[pocl]'``)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pyopencl as cl
import pytest
from device_kernels import DeviceKernel, device_kernels
from software_device import missing, sizes_of, tensors_before

from qsparse_export.runtimes.tvm.gpu.program import Program

REMEDY = "pip install 'qsparse-export[tvm-gpu-test]'"


@dataclass
class Pocl:
    """``built`` are the kernels of programs that have run."""

    context: cl.Context
    queue: cl.CommandQueue
    built: dict[int, tuple[Program, list[tuple[DeviceKernel, cl.Kernel]]]] = field(default_factory=dict)

    @staticmethod
    def open() -> Pocl:
        """Fails the test where there is no PoCL."""
        try:
            platforms = [platform for platform in cl.get_platforms() if platform.name == "Portable Computing Language"]
        except cl.LogicError as error:
            pytest.fail(missing("PoCL", error, [REMEDY]), pytrace=False)
        if not platforms:
            pytest.fail(missing("PoCL", "there are other OpenCL platforms only", [REMEDY]), pytrace=False)
        context = cl.Context(platforms[0].get_devices()[:1])
        return Pocl(context, cl.CommandQueue(context))

    def run(self, program: Program, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tensors = tensors_before(program, inputs)
        flags = cl.mem_flags.READ_WRITE | cl.mem_flags.COPY_HOST_PTR
        memory = {name: cl.Buffer(self.context, flags, hostbuf=tensor) for name, tensor in tensors.items()}
        for kernel, function in self.build(program):
            launch = kernel.launch(sizes_of(program, inputs))
            arguments = [memory[each] if isinstance(each, str) else np.int32(each) for each in launch.arguments]
            items = launch.blocks_x * launch.threads, launch.blocks_y
            function(self.queue, items, (launch.threads, 1), *arguments)
        after = {name: np.empty_like(tensor) for name, tensor in tensors.items()}
        for name, tensor in after.items():
            cl.enqueue_copy(self.queue, tensor, memory[name])
        return after

    def build(self, program: Program) -> list[tuple[DeviceKernel, cl.Kernel]]:
        """Its kernels, once."""
        if id(program) not in self.built:
            kernels = [
                (kernel, cl.Kernel(cl.Program(self.context, kernel.source).build(), kernel.name))
                for kernel in device_kernels(program, "opencl")
            ]
            self.built[id(program)] = program, kernels  # with the program, so that its id stays taken
        return self.built[id(program)][1]
