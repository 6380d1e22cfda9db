"""Builds libqsparse_ort_cuda, the kernel library with the ops of ONNX Runtime's CUDA provider, by nvcc."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

from qsparse_export.errors import TargetError
from qsparse_export.runtimes.ort import cross_build
from qsparse_export.targets.detect import host

ARCHITECTURES = ("sm_80", "sm_87", "sm_89", "sm_90")
_PTX = "90"
"""What drivers translate for GPUs that came later."""
_PORTABLE = "or export with --portable, to run the function bodies"


def find_nvcc() -> Path | None:
    """nvcc on the path, else the one of the Python packages of the extra [cuda]; None where there is neither."""
    found = shutil.which("nvcc")
    if found is not None:
        return Path(found)
    packaged = sorted(folder for path in sys.path for folder in Path(path).glob("nvidia/cu*/bin/nvcc"))
    return packaged[-1] if packaged else None


def architectures_of(features: Collection[str]) -> tuple[str, ...]:
    """The GPUs that a target with these features means: the one that they name, or all that the kernels are for."""
    return tuple(name for name in ARCHITECTURES if name in features) or ARCHITECTURES


def require_tools(target: str, triple: str, features: Collection[str]) -> cross_build.Tools:
    """The programs to build for ``triple`` and the GPUs of ``features`` with; TargetError, which names what is missing."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise TargetError(
            f"target {target}: its kernels are compiled by nvcc, which is not here; install CUDA 13, or: "
            f"pip install 'qsparse-export[cuda]', {_PORTABLE}"
        )
    if triple != host().triple:
        raise TargetError(
            f"target {target} is {triple}, and nvcc on this machine ({host().triple}) links for it only with CUDA's static "
            f"runtime of that architecture, which is not here; export on such a machine, {_PORTABLE}"
        )
    cmake, generator = cross_build.require_cmake(target)
    numbers = [name.removeprefix("sm_") for name in architectures_of(features)]
    codes = [f"{number}-real" for number in numbers] + ([f"{_PTX}-virtual"] if len(numbers) > 1 else [])
    options = ("-DQSK_BUILD_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(codes)}")
    return cross_build.Tools(str(nvcc), f"{_version(nvcc)} for {', '.join(codes)}", cmake, generator, options)


def build(target: str, triple: str, features: Collection[str]) -> Path:
    """The path of the library, from the cache or built now; TargetError when it cannot be built."""
    return cross_build.build_with(require_tools(target, triple, features), triple, "cuda-library")


def _version(nvcc: Path) -> str:
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"release [\d.]+, V([\d.]+)", done.stdout)
    if done.returncode != 0 or found is None:
        raise TargetError(f"{nvcc} --version failed: {done.stderr.strip() or done.stdout.strip()}; install CUDA again")
    return f"nvcc {found[1]}"
