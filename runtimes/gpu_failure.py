"""What is said of an NVIDIA GPU that fails in the middle of a run."""

from __future__ import annotations

import re

from qsparse_export.errors import TargetError

_NO_MEMORY = re.compile(
    r"out of memory|failed to allocate memory", re.IGNORECASE
)  # of CUDA, and of ONNX Runtime's arena


def is_out_of_memory(said: str) -> bool:
    """Whether a GPU that said so lives on; after any other failure CUDA refuses all that this process asks of it."""
    return _NO_MEMORY.search(said) is not None


def gpu_failure(said: str, instead: str) -> TargetError:
    """The error for what CUDA or a runtime ``said``, of which the first line counts; ``instead``: another way to run."""
    first = next(iter(said.strip().splitlines()), "it did not say why")
    if is_out_of_memory(said):
        advice = "its memory is too small for the model and its cache: end what else uses it (nvidia-smi shows it)"
    else:
        advice = (
            "look at nvidia-smi and, for the driver's own word (Xid), at dmesg; then run it again, as a new process"
        )
    return TargetError(f"the GPU failed: {first}; {advice}, {instead}")
