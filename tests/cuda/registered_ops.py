"""Prints as JSON the ops that the CUDA provider of onnxruntime-gpu, which PYTHONPATH names, registers kernels for."""

import json

from onnxruntime.capi import onnxruntime_pybind11_state as state

kernels = [kernel for kernel in state.get_all_opkernel_def() if kernel.provider == "CUDAExecutionProvider"]
names = {f"{kernel.domain}::{kernel.op_name}" if kernel.domain else kernel.op_name for kernel in kernels}
print(json.dumps(sorted(names)))
