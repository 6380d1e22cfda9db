"""BUNDLE LIBRARY: runs a decoder's single step on the CUDA provider, in a graph that the provider captures: shapes and
addresses stay the same, the mask has the length of the cache. Prints JSON of each run: ``calls`` of the kernels of LIBRARY
by op, what the stand-in has counted, and ``problem``, the first thing that it has refused.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

from qsparse_export.runtimes.ort.library import open_library
from qsparse_export.runtimes.ort.runtime import CUDA_PROVIDER

BUNDLE, LIBRARY = map(Path, sys.argv[1:])
ROOM = 512
"""Positions of the cache: so many that attention is cut into pieces, as it is with the past of a real text."""
GRAPHS = ("-1", "1", "1", "-1", "1")
"""Of each run the number of its graph; -1: none."""
SIZES = {"batch": 1, "sequence": 1, "total": ROOM, "past": ROOM}
KINDS = {"tensor(int64)": "int64", "tensor(float)": "float32", "tensor(float16)": "float16"}


def opened() -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.register_custom_ops_library(str(LIBRARY))
    providers = [(CUDA_PROVIDER, {"enable_cuda_graph": "1"})]
    return onnxruntime.InferenceSession(BUNDLE / "model.onnx", options, providers=providers)


def bound(session: onnxruntime.InferenceSession) -> onnxruntime.IOBinding:
    """Every input and output at an address that stays: caches are outputs in place. A binding keeps its tensors alive."""
    binding = session.io_binding()
    tensors: dict[str, onnxruntime.OrtValue] = {}
    for value in (*session.get_inputs(), *session.get_outputs()):
        name = value.name.replace("present.", "past_key_values.")
        if name not in tensors:
            shape = [SIZES.get(dim, dim) for dim in value.shape]
            tensors[name] = onnxruntime.OrtValue.ortvalue_from_numpy(np.ones(shape, KINDS[value.type]), "cuda", 0)
    for value in session.get_inputs():
        binding.bind_ortvalue_input(value.name, tensors[value.name])
    for value in session.get_outputs():
        binding.bind_ortvalue_output(value.name, tensors[value.name.replace("present.", "past_key_values.")])
    return binding


stand_in = ctypes.CDLL("libcudart.so.13", ctypes.RTLD_GLOBAL)  # so that the emulated kernels keep to its streams
stand_in.stand_in_take_counts.restype = stand_in.stand_in_problem.restype = ctypes.c_char_p
kernels = open_library(LIBRARY)
session = opened()
binding = bound(session)
report = []
for graph in GRAPHS:
    before = kernels.calls()
    stand_in.stand_in_take_counts()
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("gpu_graph_id", graph)
    session.run_with_iobinding(binding, options)
    calls = {op: each["cuda"] - before.get(op, {}).get("cuda", 0) for op, each in kernels.calls().items()}
    counts = json.loads(stand_in.stand_in_take_counts())
    report.append({"calls": calls, "problem": stand_in.stand_in_problem().decode(), **counts})
print(json.dumps(report))
