"""Libraries that stand for CUDA's, linked by nvcc, which has the headers."""

from __future__ import annotations

import fcntl
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from qsparse_export.runtimes.ort.cuda_build import find_nvcc

HERE = Path(__file__).parent
HEADERS = sorted(HERE.glob("stand_in_*.h"))
RUNTIME_SOURCES = (HERE / "stand_in_runtime.cc", HERE / "stand_in_memory.cc")
RUNTIME, DRIVER = "libcudart.so.13", "libcuda.so.1"


@contextmanager
def built_once(folder: Path, inputs: Iterable[Path]) -> Iterator[bool]:
    """Whether ``folder`` must be filled, again where an input is newer; one process at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "done"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        newest = max(path.stat().st_mtime for path in (*inputs, Path(__file__)))
        is_old = not done.exists() or done.stat().st_mtime < newest
        yield is_old
        if is_old:
            done.touch()


def link(library: Path, sources: Sequence[Path], includes: Sequence[Path] = (), *, versioned: bool) -> None:
    """Write ``library``; ``versioned``: its functions have its name as their version, as NVIDIA's have."""
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.fail("nvcc is missing, which this needs: pip install 'qsparse-export[cuda]'", pytrace=False)
    flags = ["-shared", "-std=c++17", "-Xcompiler=-fPIC,-w", f"-Xlinker=-soname,{library.name}", "--cudart=none"]
    flags += [f"-I{folder}" for folder in includes]
    if versioned:
        versions = library.parent / f"{library.name}.map"
        versions.write_text(f"{library.name} {{ global: *; }};\n", "utf-8")
        flags.append(f"-Xlinker=--version-script={versions}")
    command = [nvcc, *flags, "-o", library, *sources]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.fail(f"{' '.join(map(str, command))}\n{done.stderr[-4000:]}", pytrace=False)
