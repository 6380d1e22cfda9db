"""GPU kernels to a shared library for TVM's runtime: CUDA with machine code, also on a machine without a GPU; OpenCL as source.

What CUDA takes in TVM 0.27. TVM only calls nvcc when its CUDA runtime library can be loaded, which wants libcuda.so.1 of the
driver; otherwise it embeds source without a word. And unless told not to, it compiles with --use_fast_math, whose divisions
are not the op's. So a child process compiles: with a stub of the driver first on its library path, an explicit architecture,
nvcc, exact arithmetic, and machine code that is not compressed, so that it can be found in the result again.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qsparse_export.errors import TargetError, UsageError, near_names
from qsparse_export.runtimes.tvm.codegen import GPU_ARCHITECTURES
from qsparse_export.runtimes.tvm.environment import require_tvm
from qsparse_export.runtimes.tvm.gpu.cubins import cubin_architectures

if TYPE_CHECKING:
    import tvm
    from tvm import tirx

KINDS = ("cuda", "opencl")
DRIVER_SYMBOLS = (
    "cuDeviceGetName",
    "cuFuncSetAttribute",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuLaunchKernelEx",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuTensorMapEncodeTiled",
)
"""What libtvm_runtime_cuda.so of TVM 0.27 has from libcuda.so.1 (``nm -D --undefined-only``). None is called to compile."""
HOST_COMPILERS = {"": "g++", "aarch64-linux-gnu": "aarch64-linux-gnu-g++"}
"""What links the library, for each triple of the host; "" is this machine."""
CHILD = "qsparse_export.runtimes.tvm.gpu.build_library"


def compile_gpu(functions: Sequence[tirx.PrimFunc], kind: str, arch: str, library: Path, host_triple: str = "") -> None:
    """Write ``library``, in which ``tvm.runtime.load_module`` finds the functions by their names, or write nothing.

    ``kind`` is of KINDS; ``arch`` of GPU_ARCHITECTURES for cuda, "" for opencl; ``host_triple`` of HOST_COMPILERS.
    UsageError for unknown ones; TargetError when TVM, nvcc or a compiler is missing, compiling fails, or the result lacks
    machine code for ``arch``.
    """
    _check(kind, arch, host_triple)
    import tvm

    names = [str(function.attrs["global_symbol"]) for function in functions]
    if len(set(names)) != len(names) or not names:
        raise UsageError(
            f"the functions are named {', '.join(names) or 'nothing'}; expected at least one, each another name"
        )
    module = tvm.IRModule(dict(zip(names, functions, strict=True)))
    _compile(module, ", ".join(names), kind, [arch] if arch else [], library, host_triple, HOST_COMPILERS[host_triple])


def compile_cuda_module(
    module: tvm.IRModule, architectures: Sequence[str], library: Path, host_triple: str, compiler: str
) -> None:
    """Write ``library``, with Relax's virtual machine code of ``module`` and machine code for each of ``architectures`` (of
    GPU_ARCHITECTURES), linked by ``compiler`` for a host of ``host_triple``; or write nothing.

    TargetError when nvcc is missing, compiling fails, or the result lacks machine code for one of them.
    """
    _compile(module, "the graph", "cuda", sorted(architectures), library, host_triple, compiler)


def _compile(
    module: tvm.IRModule,
    what: str,
    kind: str,
    architectures: Sequence[str],
    library: Path,
    host_triple: str,
    compiler: str,
) -> None:
    import tvm

    with tempfile.TemporaryDirectory(dir=library.parent, prefix=f".{library.name}-") as folder:
        given, made = Path(folder) / "module.json", Path(folder) / "library.so"
        given.write_text(tvm.ir.save_json(module), "utf-8")
        environment = cuda_environment(Path(folder), architectures[1:]) if kind == "cuda" else dict(os.environ)
        arch = architectures[0] if architectures else ""
        command = [sys.executable, "-P", "-m", CHILD, str(given), kind, arch, host_triple, _tool(compiler), str(made)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        label = f"{kind} {', '.join(architectures)}".strip()
        if done.returncode != 0 or not made.exists():
            raise TargetError(f"TVM could not compile {what} for {label}:\n{done.stderr[-4000:]}")
        found = set(cubin_architectures(made.read_bytes()))
        if kind == "cuda" and found != set(architectures):
            raise TargetError(
                f"what TVM compiled for {label} holds machine code for {', '.join(sorted(found)) or 'no GPU'}; "
                "expected no more and no less. TVM embeds source when it does not find libcuda.so.1 or nvcc"
            )
        os.replace(made, library)


def _check(kind: str, arch: str, host_triple: str) -> None:
    require_tvm()
    if kind not in KINDS:
        raise UsageError(f"{kind!r} is no kind of GPU code that goes into a library; {near_names(kind, KINDS)}")
    if kind == "cuda" and arch not in GPU_ARCHITECTURES:
        raise UsageError(
            f"{arch!r} is no architecture of NVIDIA GPUs known here; {near_names(arch, GPU_ARCHITECTURES)}"
        )
    if kind != "cuda" and arch:
        raise UsageError(f"the architecture is {arch!r}; {kind} has none, expected ''")
    if host_triple not in HOST_COMPILERS:
        raise UsageError(f"{host_triple!r} is no host known here; {near_names(host_triple, HOST_COMPILERS)}")


def cuda_environment(folder: Path, more: Sequence[str] = ()) -> dict[str, str]:
    """Environment of a process in which TVM compiles for CUDA, exactly and without a GPU; the stub goes to ``folder``.

    ``more`` are architectures beside the one of TVM's target, which knows of one alone. TargetError when nvcc, its runtime
    library or a C compiler is missing.
    """
    nvcc = find_nvcc()
    source = folder / "libcuda_stub.c"
    source.write_text("".join(f"int {name}(void) {{ return 100; }}\n" for name in DRIVER_SYMBOLS), "utf-8")
    stub = folder / "libcuda.so.1"
    command = [_tool("cc"), "-shared", "-fPIC", f"-Wl,-soname,{stub.name}", "-o", str(stub), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    flags = [os.environ.get("NVCC_APPEND_FLAGS", ""), "--no-compress", "--disable-warnings"]
    flags += [f"-gencode arch=compute_{arch[3:]},code={arch}" for arch in more]
    libraries = [str(folder), *map(str, _runtime_folders(nvcc)), os.environ.get("LD_LIBRARY_PATH", "")]
    return {
        **os.environ,
        "PATH": f"{nvcc.parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, libraries)),
        "TVM_CUDA_COMPILE_MODE": "nvcc",
        "TVM_CUDA_NVCC_NO_FAST_MATH": "1",
        # Warnings are of variables that TVM binds and does not use: thousands of characters before an error.
        "NVCC_APPEND_FLAGS": " ".join(filter(None, flags)),
    }


def require_tools() -> None:
    """TargetError when nvcc or a C compiler is missing."""
    find_nvcc()
    _tool("cc")


def find_nvcc() -> Path:
    """The compiler on the path, else the one of the Python packages. TargetError where there is none."""
    found = shutil.which("nvcc")
    if found is not None:
        return Path(found)
    packaged = sorted(folder for path in sys.path for folder in Path(path).glob("nvidia/cu*/bin/nvcc"))
    if not packaged:
        raise TargetError(
            "nvcc is missing, which makes machine code: pip install 'qsparse-export[cuda]', or install CUDA 13"
        )
    return packaged[-1]


def _runtime_folders(nvcc: Path) -> list[Path]:
    """Where libcudart may be: beside a real nvcc, which ``--dryrun`` names as TOP where the one on the path is a script."""
    done = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.+)$", done.stderr, re.MULTILINE)
    root = Path(top[1]) if top else nvcc.parent.parent
    return [folder for folder in (root / "lib64", root / "lib") if any(folder.glob("libcudart.so.*"))]


def _tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        package = "g++-aarch64-linux-gnu" if name.startswith("aarch64") else "g++"
        raise TargetError(f"{name} is missing, which links the library: apt-get install {package}")
    return found
