"""The CUDA kernels compiled by nvcc, and what ptxas says of each.

``python tests/cuda/compiled_kernels.py`` builds them anew and puts the table into docs/cuda.md.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qsparse_export.runtimes.ort.cuda_build import find_nvcc

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = (80, 87, 89, 90)
"""Compute capabilities times ten: those of the targets cuda-smNN."""
PAGE = ROOT / "docs" / "cuda.md"
BEGIN, END = "<!-- made by tests/cuda/compiled_kernels.py -->\n", "<!-- end -->\n"
ELF_MACHINE_CUDA = 190


def kernels_in_sources() -> set[str]:
    """Names of __global__ functions."""
    text = "".join(path.read_text("utf-8") for path in (ROOT / "runtimes" / "cuda").glob("*.cu"))
    return set(re.findall(r"__global__ void(?: __launch_bounds__\([^)]*\))?\s+(\w+)\(", text))


class NoCompiler(Exception):
    """There is no nvcc; the message says what to install."""


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on one architecture; bytes but for the registers of a thread."""

    kernel: str
    architecture: int
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int


@dataclass(frozen=True)
class Build:
    """``log`` is what ptxas said."""

    folder: Path
    log: str
    nvcc_version: str

    @property
    def cubins(self) -> list[Path]:
        return sorted((self.folder / "runtimes" / "cuda").glob("*.cubin"))


def require_nvcc() -> Path:
    """The compiler; NoCompiler where there is none."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise NoCompiler("nvcc is missing, which this needs: pip install 'qsparse-export[cuda]', or install CUDA 13")
    return nvcc


def build(name: str = "nvcc") -> Build:
    """Compile all kernels in build/tests/cuda/<name>; a later call only compiles when a source has changed."""
    nvcc = require_nvcc()
    folder = ROOT / "build" / "tests" / "cuda" / name
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "ptxas.log"
    sources = [path for part in ("cuda", "kernels/include/qsk") for path in (ROOT / "runtimes" / part).iterdir()]
    newest = max(path.stat().st_mtime for path in (*sources, ROOT / "CMakeLists.txt", Path(__file__)))
    with (folder.parent / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not log.exists() or log.stat().st_mtime < newest:
            shutil.rmtree(folder)
            folder.mkdir()
            flags = "-DCMAKE_CUDA_FLAGS=-Xptxas=-v --keep"
            configure = ["-S", str(ROOT), "-B", str(folder), "-DQSK_BUILD_ORT=OFF", "-DQSK_BUILD_CUDA=ON", flags]
            run_cmake(configure, {**os.environ, "CUDACXX": str(nvcc)})
            output = run_cmake(["--build", str(folder), "--target", "qsk_cuda", "--parallel", "2"], None)
            log.write_text(output, "utf-8")
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        release = re.search(r"release [\d.]+, V([\d.]+)", version)
        return Build(folder, log.read_text("utf-8"), release[1] if release else version)


def run_cmake(arguments: Sequence[str], environment: dict[str, str] | None) -> str:
    """What it printed; CalledProcessError with the output as its message where it fails."""
    beside = Path(sys.executable).parent / "cmake"
    command = [str(beside) if beside.exists() else "cmake", *arguments]
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-4000:]}")
    return done.stdout


def resources(log: str) -> list[Resources]:
    """One for each kernel and architecture, in the order of their names."""
    entry = re.compile(
        r"Compiling entry function '(\S+)' for 'sm_(\d+)'\n.*\n"
        r"\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n.*Used (\d+) registers(.*)\n"
    )
    found = []
    for symbol, architecture, stack, stores, loads, registers, rest in entry.findall(log):
        shared = re.search(r"(\d+) bytes smem", rest)
        numbers = int(registers), int(shared[1]) if shared else 0, int(stack), int(stores) + int(loads)
        found.append(Resources(kernel_name(symbol), int(architecture), *numbers))
    return sorted(found, key=lambda row: (row.kernel, row.architecture))


def kernel_name(symbol: str) -> str:
    """``_ZN8qsk_cuda..._10nbits_gemvILi8EtEEv...`` to ``nbits_gemv<8, half>``: the Itanium ABI, as far as it is used."""
    position, name = len("_ZN"), ""
    while (length := re.match(r"\d+", symbol[position:])) is not None:
        position += len(length[0])
        name = symbol[position : position + int(length[0])]
        position += int(length[0])
    arguments = re.match(r"I((?:Li\d+E|f|t)+)E", symbol[position:])
    if arguments is None:
        return name
    types = {"f": "float", "t": "half"}
    spelled = [types.get(part, part[2:-1]) for part in re.findall(r"Li\d+E|f|t", arguments[1])]
    return f"{name}<{', '.join(spelled)}>"


def cubin_architecture(cubin: bytes) -> int:
    """Compute capability times ten of machine code; ValueError for anything else."""
    if cubin[:4] != b"\x7fELF" or struct.unpack_from("<H", cubin, 18)[0] != ELF_MACHINE_CUDA:
        raise ValueError("not machine code for an NVIDIA GPU")
    return struct.unpack_from("<I", cubin, 48)[0] >> 8 & 0xFF


def table(built: Build) -> str:
    """Markdown: registers of a thread and bytes of shared memory of a block, for each kernel and architecture."""
    rows = resources(built.log)
    by_kernel: dict[str, dict[int, Resources]] = {}
    for row in rows:
        by_kernel.setdefault(row.kernel, {})[row.architecture] = row
    lines = [
        f"nvcc {built.nvcc_version}: registers of a thread (of the 255 there can be). Blocks have 256 threads. Bytes spilled: "
        f"{sum(row.spill_bytes for row in rows)}. Bytes of stack: {sum(row.stack_bytes for row in rows)}.",
        "",
        f"| kernel | {' | '.join(f'sm_{architecture}' for architecture in ARCHITECTURES)} | shared memory, bytes |",
        f"|---|{'---:|' * (len(ARCHITECTURES) + 1)}",
    ]
    for kernel, each in by_kernel.items():
        registers = " | ".join(str(each[architecture].registers) for architecture in ARCHITECTURES)
        lines.append(f"| `{kernel}` | {registers} | {max(row.shared_bytes for row in each.values())} |")
    return "\n".join(lines) + "\n"


def table_on_page() -> str:
    """What docs/cuda.md holds now."""
    return PAGE.read_text("utf-8").split(BEGIN)[1].split(END)[0]


if __name__ == "__main__":
    page = PAGE.read_text("utf-8")
    PAGE.write_text(page.replace(BEGIN + table_on_page() + END, BEGIN + table(build()) + END), "utf-8")
