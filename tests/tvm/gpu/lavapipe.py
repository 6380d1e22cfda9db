"""Lavapipe, Mesa's Vulkan on the CPU, through wgpu-native: WGSL with work-groups and barriers, compiled by naga."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import wgpu
from device_kernels import DeviceKernel, device_kernels
from software_device import missing, sizes_of, tensors_before

from qsparse_export.runtimes.tvm.gpu.program import Program

REMEDIES = ("pip install 'qsparse-export[tvm-gpu-test]'", "apt-get install mesa-vulkan-drivers")
WORD_BYTES = 4


@dataclass
class Lavapipe:
    """The limits are WebGPU's defaults, which every browser has, not the adapter's."""

    device: wgpu.GPUDevice
    built: dict[int, tuple[Program, list[tuple[DeviceKernel, wgpu.GPUComputePipeline]]]] = field(default_factory=dict)

    @staticmethod
    def open() -> Lavapipe:
        """Fails the test where there is no such adapter."""
        adapters = wgpu.gpu.enumerate_adapters_sync()
        found = [
            each for each in adapters if each.info["adapter_type"] == "CPU" and each.info["backend_type"] == "Vulkan"
        ]
        if not found:
            names = ", ".join(each.summary for each in adapters) or "there is no adapter"
            pytest.fail(missing("lavapipe", names, REMEDIES), pytrace=False)
        return Lavapipe(found[0].request_device_sync(required_features=["shader-f16"]))

    def run(self, program: Program, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        usage = wgpu.BufferUsage
        tensors = tensors_before(program, inputs)
        memory = {
            name: self.device.create_buffer_with_data(
                data=tensor.tobytes() + bytes(-tensor.nbytes % WORD_BYTES), usage=usage.STORAGE | usage.COPY_SRC
            )
            for name, tensor in tensors.items()
        }
        for kernel, pipeline in self.build(program):
            launch = kernel.launch(sizes_of(program, inputs))
            numbers = np.array(launch.numbers, np.uint32)
            uniform = self.device.create_buffer_with_data(data=numbers.tobytes(), usage=usage.UNIFORM)
            bound = [*(memory[each] for each in launch.arguments if isinstance(each, str)), uniform]
            entries = [{"binding": i, "resource": {"buffer": buffer}} for i, buffer in enumerate(bound)]
            group = self.device.create_bind_group(layout=pipeline.get_bind_group_layout(0), entries=entries)
            encoder = self.device.create_command_encoder()
            compute = encoder.begin_compute_pass()
            compute.set_pipeline(pipeline)
            compute.set_bind_group(0, group)
            compute.dispatch_workgroups(launch.blocks_x, launch.blocks_y)
            compute.end()
            self.device.queue.submit([encoder.finish()])
        return {
            name: np.frombuffer(self.device.queue.read_buffer(memory[name]), tensor.dtype)[: tensor.size].reshape(
                tensor.shape
            )
            for name, tensor in tensors.items()
        }

    def build(self, program: Program) -> list[tuple[DeviceKernel, wgpu.GPUComputePipeline]]:
        """Its kernels, once."""
        if id(program) not in self.built:
            kernels = []
            for kernel in device_kernels(program, "webgpu"):
                module = self.device.create_shader_module(code=kernel.source)
                stage = {"module": module, "entry_point": kernel.name}
                kernels.append((kernel, self.device.create_compute_pipeline(layout="auto", compute=stage)))
            self.built[id(program)] = program, kernels  # with the program, so that its id stays taken
        return self.built[id(program)][1]
