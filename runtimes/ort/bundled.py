"""The native files of a bundle: the installed ones for machines of this kind, cross-compiled ones for others."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsparse_export.errors import TargetError
from qsparse_export.runtimes.ort import cross_build, cuda_build, library
from qsparse_export.targets.detect import host
from qsparse_export.targets.target import op_sets

if TYPE_CHECKING:
    from qsparse_export.targets.target import Target


def is_installed(target: Target) -> bool:
    """Whether what this installation holds runs on ``target``: one library serves every processor of an architecture."""
    return "cuda" not in target.features and _is_here(target)


def _is_here(target: Target) -> bool:
    here = host()
    return (target.arch, target.system) == (here.arch, here.system)


def require_target(target: Target) -> None:
    """Raises TargetError when the library for ``target`` cannot be had on this machine, or lacks ops that it names."""
    if not is_installed(target):
        _tools(target)
    is_gpu = "cuda" in target.features  # whatever it is built for, the sources are the same
    known = op_sets()["cuda-kernels"] if is_gpu else frozenset(library.open_library().ops)
    if unknown := sorted(target.native_ops - known):
        raise TargetError(
            f"target {target.name} names the native ops {', '.join(unknown)}, which the kernel library lacks"
            f"{' for GPUs' if is_gpu else ''}; it has {', '.join(sorted(known))}"
        )


def add_library(target: Target, folder: Path) -> str:
    """Copies the kernel library for ``target`` into ``folder``, building it first where it must; returns its name."""
    return _add(library.library_path() if is_installed(target) else _built_library(target), folder)


def add_device_bench(target: Target, folder: Path) -> str:
    """Copies the benchmark program for ``target`` into ``folder``, as :func:`add_library`; returns its name."""
    if is_installed(target):
        return _add(library.device_bench_path(), folder)
    return _add(cross_build.build(target.name, target.triple, target.system, "device-bench"), folder)


def verifying_library(target: Target) -> Path | None:
    """The library that a bundle for ``target`` is verified with, where that is another than the installed one: built for a
    GPU, it holds the CPU's kernels too, so that a machine of the same kind loads it. Built now unless it is in the cache."""
    return _built_library(target) if "cuda" in target.features and _is_here(target) else None


def installed_record() -> dict[str, Any]:
    """What the installed library is: its triple, its sources, the C library that it needs, and what compiled it."""
    return _record(library.library_path(), host().triple, "installed with the package")


def record(target: Target) -> dict[str, Any]:
    """The same of the library in a bundle for ``target``; for a GPU also the architectures that it holds kernels for."""
    if is_installed(target):
        return installed_record()
    made = _record(_built_library(target), target.triple, _tools(target).compiler_version)
    return made | ({"gpus": list(cuda_build.architectures_of(target.features))} if "cuda" in target.features else {})


def _record(file: Path, triple: str, compiler: str) -> dict[str, Any]:
    return {
        "triple": triple,
        "sources_sha256": cross_build.sources_sha256(),
        "needs_glibc": library.needed_glibc(file),
        "compiler": compiler,
    }


def _tools(target: Target) -> cross_build.Tools:
    if "cuda" in target.features:
        return cuda_build.require_tools(target.name, target.triple, target.features)
    return cross_build.require_tools(target.name, target.triple, target.system)


def _built_library(target: Target) -> Path:
    return cross_build.build_with(
        _tools(target), target.triple, "cuda-library" if "cuda" in target.features else "library"
    )


def _add(file: Path, folder: Path) -> str:
    shutil.copy2(file, folder / file.name)
    return file.name
