"""ONNX Runtime's own CUDA provider on a machine without a GPU: a stand-in for the CUDA libraries whose kernels do nothing.

The provider comes from the wheel onnxruntime-gpu. All that it does on the host is done: it chooses which nodes it takes,
makes their kernels, checks shapes, types and attributes at every run, allocates and launches. What it computes is nothing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from kernel_runs import tool
from stand_in_libraries import DRIVER, HEADERS, RUNTIME, RUNTIME_SOURCES, built_once, link
from wheels import folder_of_wheel

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "onnxruntime-gpu"
PACKAGE = "onnxruntime-gpu==1.31.1"
"""The newest on PyPI in November 2026."""
GENAI_PACKAGE = "onnxruntime-genai-cuda==0.18.0"

CUDNN = "libcudnn.so.9"
TENSORRT = ("libnvinfer.so.10", "libnvonnxparser.so.10")
WITHOUT_CALLS = ("libcurand.so.10", "libcublas.so.13", "libcublasLt.so.13", "libcufft.so.12")
"""What is named as needed, and may have no function that is taken from it."""
_PREFIXES = r"(?:__cuda|cuda|cublas|cudnn|curand|cuTensor|createInfer|createNv|getPlugin|getInfer)\w*"
_VERSION = {"cudnnGetVersion": 92000}
_WRITTEN = {
    "cuInit": "int cuInit(unsigned) { return 0; }",
    "cuDeviceGet": "int cuDeviceGet(int* device, int) { *device = 0; return 0; }",
    "cuDeviceGetName": 'int cuDeviceGetName(char* name, int, int) { strcpy(name, getenv("STAND_IN_NAME")); return 0; }',
}
"""Functions of the driver that this project calls itself. The GPU's name is what STAND_IN_NAME says."""


def packaged_provider() -> Path:
    """The folder to put on Python's path for onnxruntime-gpu, taken from PyPI once; nothing is installed."""
    return folder_of_wheel(PACKAGE, CACHE / "package")


def packaged_genai() -> Path:
    """The same for onnxruntime-genai-cuda."""
    return folder_of_wheel(GENAI_PACKAGE, CACHE.with_name("onnxruntime-genai-cuda") / "package")


def build() -> Path:
    """The folder of libraries that stand for CUDA's; compiled again when the source is newer."""
    capi = packaged_provider() / "onnxruntime" / "capi"
    providers = [capi / f"libonnxruntime_providers_{name}.so" for name in ("cuda", "tensorrt")]
    providers.append(packaged_genai() / "onnxruntime_genai" / "libonnxruntime-genai-cuda.so")
    folder = ROOT / "build" / "tests" / "cuda" / "stand_in"
    with built_once(folder, (*RUNTIME_SOURCES, *HEADERS, Path(__file__), *providers)) as is_old:
        if is_old:
            texts = (source.read_text("utf-8") for source in RUNTIME_SOURCES)
            own = {name for text in texts for name in re.findall(r"\b(\w+)\([^;{}]*\) \{", text)}
            for library, functions in _wanted(providers).items():
                _compile(folder, library, functions - own if library == RUNTIME else functions)
    return folder


def _wanted(providers: list[Path]) -> dict[str, set[str]]:
    """Library to the functions that are taken from it; of cuDNN, which the first provider opens itself, all that it names."""
    wanted: dict[str, set[str]] = defaultdict(set)
    for library in (*WITHOUT_CALLS, DRIVER, *TENSORRT):
        wanted[library] = set()
    wanted[DRIVER] |= _WRITTEN.keys()
    for provider in providers:
        nm = [tool("nm", "binutils"), "-D", "--undefined-only", provider]
        listed = subprocess.run(nm, capture_output=True, text=True, check=True).stdout
        for name, library in re.findall(rf"U ({_PREFIXES})(?:@+(\S+))?$", listed, re.MULTILINE):
            wanted[library or (TENSORRT[0] if name.startswith(("create", "get")) else DRIVER)].add(name)
    wanted[CUDNN] |= {name.decode() for name in re.findall(rb"(?<=\0)cudnn[A-Z]\w+(?=\0)", providers[0].read_bytes())}
    return wanted


def _compile(folder: Path, library: str, functions: set[str]) -> None:
    source = folder / f"{library}.cc"
    written = "".join(map(_succeeding, sorted(functions)))
    source.write_text(f"#include <stdlib.h>\n#include <string.h>\n{written}", "utf-8")
    sources = [source, *(RUNTIME_SOURCES if library == RUNTIME else ())]
    link(folder / library, sources, versioned=library not in (DRIVER, *TENSORRT))


def _succeeding(name: str) -> str:
    """A function that returns 0, or makes a handle that is not null."""
    if name in _WRITTEN:
        return f'extern "C" {_WRITTEN[name]}\n'
    if name in _VERSION:
        return f'extern "C" unsigned long {name}() {{ return {_VERSION[name]}; }}\n'
    if "Create" in name:
        return f'extern "C" int {name}(void** made) {{ *made = reinterpret_cast<void*>(8); return 0; }}\n'
    if re.search(r"String|Name", name):
        return f'extern "C" const char* {name}() {{ return "stand-in"; }}\n'
    if re.search(r"Reduction\w+Size", name):
        return (
            f'extern "C" int {name}(void*, void*, void*, void*, unsigned long* bytes) {{ *bytes = 256; return 0; }}\n'
        )
    return f'extern "C" int {name}() {{ return 0; }}\n'


def run(bundle: Path, library: Path) -> dict[str, Any]:
    """What on_stand_in.py says of the decoder in ``bundle``, with ``library`` registered."""
    return _printed("on_stand_in.py", bundle, library)


def captured(bundle: Path, library: Path) -> list[dict[str, Any]]:
    """What captured_on_stand_in.py says of runs of that decoder in a captured graph."""
    return _printed("captured_on_stand_in.py", bundle, library)


def generated_by_genai(bundle: Path) -> dict[str, Any]:
    """What genai_on_stand_in.py says of ``bundle``, with the library that lies in it."""
    return _printed("genai_on_stand_in.py", bundle)


def qsparse_run(library: Path, *arguments: Path | str, **failing: str) -> subprocess.CompletedProcess[str]:
    """The command with ``library`` on the GPU, however it ends; ``failing`` tells when to fail (stand_in_runtime.cc)."""
    return _process("run_on_stand_in.py", (library, *arguments), {**environment(), **failing})


def registered_ops() -> list[str]:
    """Ops that the provider has kernels for, ``domain::Name`` or ``Name`` of the standard domain."""
    return _printed("registered_ops.py")


def environment() -> dict[str, str]:
    """Of processes that find onnxruntime-gpu in place of the installed ONNX Runtime, and the stand-in for CUDA."""
    packages = os.pathsep.join(map(str, (packaged_provider(), packaged_genai())))
    return {**os.environ, "LD_LIBRARY_PATH": str(build()), "PYTHONPATH": packages}


def driver_alone() -> Path:
    """A folder with the driver and no other library of CUDA."""
    folder = build()
    alone = folder.with_name("driver_alone")
    alone.mkdir(exist_ok=True)
    shutil.copy2(folder / DRIVER, alone)
    return alone


def refusal(bundle: Path, library: Path) -> str:
    """What the same process says where there are no CUDA libraries at all."""
    done = _process("on_stand_in.py", (bundle, library), {**environment(), "LD_LIBRARY_PATH": ""})
    assert done.returncode != 0
    return done.stderr


def _printed(script: str, *arguments: Path) -> Any:
    done = _process(script, arguments, environment())
    if done.returncode != 0:
        pytest.fail(f"{' '.join(map(str, done.args))}\n{done.stderr[-4000:]}", pytrace=False)
    return json.loads(done.stdout)


def _process(
    script: str, arguments: Sequence[Path | str], environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, Path(__file__).parent / script, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
