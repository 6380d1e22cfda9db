"""BUNDLE LIBRARY: runs a decoder on the CUDA provider of onnxruntime-gpu, which PYTHONPATH names; a process of its own, since
another ONNX Runtime is in the tests'. Prints JSON: ``placed`` (provider to ops of the nodes that ran), kernel ``calls``
of LIBRARY, and how many ``tokens`` were generated, which mean nothing.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime

from qsparse_export.bundle import Bundle
from qsparse_export.generate import Generator
from qsparse_export.runtimes.ort.runtime import CUDA_PROVIDER, OrtRuntime

BUNDLE, LIBRARY = sys.argv[1:]
PROMPT, TOKENS = (1, 3, 5, 7, 9), 6


def placed(bundle: Path) -> dict[str, list[str]]:
    """By ONNX Runtime's own profile of a run."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(Path(tempfile.mkdtemp()) / "profile")
    options.register_custom_ops_library(LIBRARY)
    session = onnxruntime.InferenceSession(bundle / "model.onnx", options, providers=[CUDA_PROVIDER])
    sizes = {"batch": 1, "sequence": 3, "total": 3, "past": 0}
    kinds = {"tensor(int64)": "int64", "tensor(float)": "float32", "tensor(float16)": "float16"}
    feeds = {
        value.name: np.ones([sizes.get(dim, dim) for dim in value.shape], kinds[value.type])
        for value in session.get_inputs()
    }
    session.run(None, feeds)
    ran: dict[str, list[str]] = {}
    for event in json.loads(Path(session.end_profiling()).read_text()):
        where = event.get("args", {}).get("provider")
        if where and event["name"].endswith("_kernel_time"):
            ran.setdefault(where, []).append(event["args"]["op_name"])
    return {where: sorted(ops) for where, ops in ran.items()}


bundle = Bundle.load(BUNDLE)
session = OrtRuntime(library=Path(LIBRARY), on_gpu=True).open(bundle.path, threads=1, native=True)
tokens = 0
for _logits, choose in Generator(session, bundle.decoder_shape()).steps(PROMPT):
    tokens += 1
    if tokens < TOKENS:
        choose(tokens)  # logits may be no numbers
report = {"tokens": tokens, "calls": session.native_calls(), "placed": placed(bundle.path)}
print(json.dumps(report))
