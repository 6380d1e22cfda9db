"""The GPU of this machine, or what is missing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qsparse_export.errors import TargetError
from qsparse_export.runtimes.tvm.environment import tvm


def cuda_device(module: Path, architectures: Sequence[str]) -> Any:
    """TVM's device, for a ``module`` with machine code for ``architectures``.

    TargetError where there is none, or one that this code does not run on: code for sm_XY runs on X.Y and, of the same X,
    on later ones (CUDA C++ Programming Guide, binary compatibility).
    """
    made_for = f"{module} was compiled for NVIDIA GPUs ({', '.join(architectures)})"
    advice = "run it on a machine that has one, or export the model with --target cpu"
    device = tvm().cuda(0)
    if not device.exist:
        raise TargetError(
            f"{made_for}, and TVM finds none here: it wants a GPU and the driver's libcuda.so.1 with CUDA's libcudart.so.13; "
            f"{advice}"
        )
    found = str(device.compute_version)
    major, minor = (int(part) for part in found.split("."))
    if not any(int(name[3:-1]) == major and int(name[-1]) <= minor for name in architectures):
        raise TargetError(f"{made_for}, and the one here is of compute capability {found}; {advice}")
    return device
