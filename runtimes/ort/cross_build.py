"""Builds the native programs of a bundle that this installation holds none for, from the sources that this package carries.

What was built is kept in the user's cache, under a key of the sources' and the compiler's content, so that the second
export copies it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from qsparse_export.errors import TargetError
from qsparse_export.runtimes.ort.library import CUDA_LIBRARY_NAME, DEVICE_BENCH_NAME, LIBRARY_NAME, source_folder

Product = Literal["library", "cuda-library", "device-bench"]
PRODUCTS: dict[Product, tuple[str, str]] = {
    "library": ("qsparse_ort", f"runtimes/ort/{LIBRARY_NAME}"),
    "cuda-library": ("qsparse_ort_cuda", f"runtimes/cuda/{CUDA_LIBRARY_NAME}"),
    "device-bench": ("qsparse_device_bench", f"runtimes/ort/device/{DEVICE_BENCH_NAME}"),
}
"""What can be built: the CMake target, and the file that it makes in the build folder."""

BUILD_TIMEOUT_SECONDS = 900
FLAGS = ("-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_SHARED_LINKER_FLAGS=-s", "-DCMAKE_EXE_LINKER_FLAGS=-s")
_ELF_MACHINES = {"aarch64": 183, "x86_64": 62}


@dataclass(frozen=True)
class Toolchain:
    """A cross compiler: its program, the Debian package that brings it, and the CMake file that names it."""

    compiler: str
    package: str
    cmake_file: str


TOOLCHAINS: dict[str, Toolchain] = {
    "aarch64-unknown-linux-gnu": Toolchain(
        "aarch64-linux-gnu-g++", "g++-aarch64-linux-gnu", "cmake/aarch64-linux-gnu.cmake"
    ),
}

# Systems that no compiler from a distribution's packages builds for, and what it would take.
_OUT_OF_REACH = {
    "android": "needs the compiler and C library of the Android NDK, which this version does not drive",
    "darwin": "needs Apple's SDK, which comes with Macs only, and this version does not drive",
}


@dataclass(frozen=True)
class Tools:
    """The programs of one build, by path. ``compiler_version`` is what the compiler says of itself, and all else that what
    is built depends on beside the sources; ``options`` are CMake's for this compiler."""

    compiler: str
    compiler_version: str
    cmake: str
    generator: str
    options: tuple[str, ...]


def require_tools(target: str, triple: str, system: str) -> Tools:
    """The programs to build for ``triple`` with; TargetError, which names what to install, where any is missing."""
    portable = "or export with --portable, to run the function bodies"
    if triple not in TOOLCHAINS:
        reason = _OUT_OF_REACH.get(system, f"needs a cross compiler for {triple}, and this version drives none")
        raise TargetError(f"target {target}: its native code {reason}; export on such a machine, {portable}")
    toolchain = TOOLCHAINS[triple]
    compiler = shutil.which(toolchain.compiler, path=search_path())
    cmake, generator, missing = _cmake()
    missing = ([] if compiler else [toolchain.package]) + missing
    if not compiler or missing:
        raise TargetError(
            f"target {target} is {triple}: its native code is cross-compiled, and this machine lacks what is in the "
            f"Debian package{'s' if len(missing) > 1 else ''} {', '.join(missing)}; install with: "
            f"apt-get install {' '.join(missing)}, {portable}"
        )
    cmake_file = f"-DCMAKE_TOOLCHAIN_FILE={source_folder() / toolchain.cmake_file}"
    return Tools(compiler, first_line(compiler), cmake, generator, (cmake_file,))


def require_cmake(target: str) -> tuple[str, str]:
    """The path of cmake and the generator that it is to use; TargetError, which names what to install, without them."""
    cmake, generator, missing = _cmake()
    if missing:
        raise TargetError(
            f"target {target}: its native code is compiled here, and this machine lacks {' and '.join(missing)}; install with: "
            f"apt-get install {' '.join(missing)}, or export with --portable, to run the function bodies"
        )
    return cmake, generator


def _cmake() -> tuple[str, str, list[str]]:
    """cmake, its generator, and the Debian packages of what is missing."""
    cmake, ninja, make = (shutil.which(program, path=search_path()) for program in ("cmake", "ninja", "make"))
    missing = ([] if cmake else ["cmake"]) + ([] if ninja or make else ["make"])
    return cmake or "", "Ninja" if ninja else "Unix Makefiles", missing


def build(target: str, triple: str, system: str, product: Product) -> Path:
    """The path of ``product`` for ``triple``, from the cache or built now; TargetError when it cannot be built."""
    return build_with(require_tools(target, triple, system), triple, product)


def build_with(tools: Tools, triple: str, product: Product) -> Path:
    """The same with tools that were found."""
    named = "\0".join((product, triple, sources_sha256(), tools.compiler_version, *FLAGS))
    key = hashlib.sha256(named.encode()).hexdigest()
    cmake_target, made = PRODUCTS[product]
    entry = cache_folder() / key
    finished = entry / Path(made).name
    if finished.is_file():
        return finished
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="building-", dir=entry.parent) as name:
            folder = Path(name)
            _compile(tools, folder, cmake_target)
            _require_machine(folder / made, triple)
            staged = folder / "entry"
            staged.mkdir()
            shutil.copy2(folder / made, staged)
            try:
                staged.rename(entry)
            except OSError:
                if not finished.is_file():  # another process was first, or the cache is broken
                    raise
    except OSError as error:
        raise TargetError(
            f"cannot keep the library for {triple} in {entry.parent}: {error.strerror or error}; "
            "free some space, or set XDG_CACHE_HOME to a folder that can be written"
        ) from error
    return finished


def cache_folder() -> Path:
    """Where built libraries are kept: ``$XDG_CACHE_HOME/qsparse-export/built``, by default in ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "qsparse-export" / "built"


@cache
def sources_sha256() -> str:
    """SHA-256 over the names and contents of the C++ sources that this package carries."""
    folder, digest = source_folder(), hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _compile(tools: Tools, folder: Path, cmake_target: str) -> None:
    sources = source_folder()
    configure = [
        *(tools.cmake, "-S", str(sources), "-B", str(folder), "-G", tools.generator),
        *tools.options,
        f"-DONNXRUNTIME_INCLUDE_DIR={sources / 'include' / 'onnxruntime'}",
        *FLAGS,
        # The same bytes wherever the package is installed.
        f"-DCMAKE_CXX_FLAGS=-ffile-prefix-map={sources}=.",
    ]
    environment = dict(os.environ, PATH=search_path())  # the generator looks for ninja there
    jobs = str(os.cpu_count() or 1)
    for command in (configure, [tools.cmake, "--build", str(folder), "--target", cmake_target, "--parallel", jobs]):
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=BUILD_TIMEOUT_SECONDS, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise TargetError(f"{' '.join(command[:2])} took more than {BUILD_TIMEOUT_SECONDS} s") from error
        if done.returncode != 0:
            said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-20:])
            raise TargetError(f"{tools.compiler} could not build the kernel library:\n{said}")


def _require_machine(file: Path, triple: str) -> None:
    head = file.read_bytes()[:20]
    machine = int.from_bytes(head[18:20], "little") if head[:4] == b"\x7fELF" else None
    if machine != _ELF_MACHINES[triple.partition("-")[0]]:
        raise TargetError(f"the compiler made {file.name} for another machine than {triple}: ELF machine {machine}")


def search_path() -> str:
    """Where programs are looked for: the folder of this Python, where pip puts programs, and then the path."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


def first_line(compiler: str) -> str:
    """What ``compiler`` says of its version; TargetError where it does not run."""
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        raise TargetError(f"{compiler} --version failed: {done.stderr.strip()}; install it again")
    return lines[0]
