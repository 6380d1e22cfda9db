"""What a kernel may use on every WebGPU device, read from its source."""

import re

from device_kernels import device_kernels

from qsparse_export.runtimes.tvm.gpu.program import Program
from qsparse_export.runtimes.tvm.gpu.workgroup import SHARED_BYTES

STORAGE_BUFFERS = 8


def require_limits(program: Program) -> None:
    """Asserts that no kernel of ``program`` exceeds them."""
    for kernel in device_kernels(program, "webgpu"):
        shared = re.findall(r"var<workgroup> \w+ : array<\w+32, (\d+)>", kernel.source)
        assert kernel.source.count("var<workgroup>") == len(shared)
        assert 4 * sum(map(int, shared)) <= SHARED_BYTES, kernel.name
        assert kernel.source.count("var<storage") <= STORAGE_BUFFERS, kernel.name
