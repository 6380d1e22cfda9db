"""Builds libqsparse_ort_cuda, the kernel library with the ops of ONNX Runtime's CUDA provider, by nvcc."""

from __future__ import annotations

import os
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
CROSS_VARIABLE = "QSPARSE_CUDA_CROSS"
"""Environment variable: a folder with CUDA's static runtime for the machine that is compiled for."""

_CROSS_FOLDERS = {"aarch64-unknown-linux-gnu": ("aarch64-linux", "sbsa-linux")}
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
    cross = () if triple == host().triple else _cross_options(target, triple, nvcc)
    cmake, generator = cross_build.require_cmake(target)
    numbers = [name.removeprefix("sm_") for name in architectures_of(features)]
    codes = [f"{number}-real" for number in numbers] + ([f"{_PTX}-virtual"] if len(numbers) > 1 else [])
    options = (
        *cross,
        "-DQSK_BUILD_CUDA=ON",
        f"-DCMAKE_CUDA_COMPILER={nvcc}",
        f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(codes)}",
    )
    return cross_build.Tools(str(nvcc), f"{_version(nvcc)} for {', '.join(codes)}", cmake, generator, options)


def _cross_options(target: str, triple: str, nvcc: Path) -> tuple[str, ...]:
    """CMake's options to compile for another machine: its compiler, and CUDA's static runtime for it."""
    tools = cross_build.require_tools(target, triple, "linux")
    top = _toolkit(nvcc)
    given = os.environ.get(CROSS_VARIABLE)
    folders = [Path(given)] if given else [top / "targets" / name for name in _CROSS_FOLDERS.get(triple, ())]
    runtime = next((found for folder in folders for found in sorted(folder.rglob("libcudart_static.a"))), None)
    if runtime is None:
        where = " or ".join(map(str, folders))
        raise TargetError(
            f"target {target} is {triple}: nvcc links for it with CUDA's static runtime of that machine, and {where} has no "
            "libcudart_static.a. Install CUDA's cross package, or have pip bring the runtime, of nvcc's version: pip install "
            f"--no-deps --only-binary=:all: --platform manylinux_2_17_{triple.partition('-')[0]} --target DIR "
            f"nvidia-cuda-runtime, and set {CROSS_VARIABLE}=DIR; or export on such a machine, {_PORTABLE}"
        )
    flags = f"-I{top / 'include'} -L{runtime.parent}"
    return (*tools.options, f"-DCMAKE_CUDA_HOST_COMPILER={tools.compiler}", f"-DCMAKE_CUDA_FLAGS={flags}")


def _toolkit(nvcc: Path) -> Path:
    """The folder of the toolkit that ``nvcc`` belongs to, which may be a script that calls another one."""
    done = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True, check=False)
    found = re.search(r"^#\$ TOP=(.+)$", done.stderr, re.MULTILINE)
    if found is None:
        raise TargetError(f"{nvcc} --dryrun does not say where CUDA is: {done.stderr.strip()}; install CUDA again")
    return Path(found[1]).resolve()


def build(target: str, triple: str, features: Collection[str]) -> Path:
    """The path of the library, from the cache or built now; TargetError when it cannot be built."""
    return cross_build.build_with(require_tools(target, triple, features), triple, "cuda-library")


def _version(nvcc: Path) -> str:
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"release [\d.]+, V([\d.]+)", done.stdout)
    if done.returncode != 0 or found is None:
        raise TargetError(f"{nvcc} --version failed: {done.stderr.strip() or done.stdout.strip()}; install CUDA again")
    return f"nvcc {found[1]}"
