"""The table of targets: what was shown of the code that runs on each, by runtime and op."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TARGETS = Path(__file__).resolve().parents[2] / "targets"
OPS = (
    "TopKSparsify",
    "TernaryMatMul",
    "SparseTernaryMatMul",
    "SparseMatMul",
    "SparseMatMulNBits",
    "DenseMatMulNBits",
    "GatherNBits",
    "CachedAttention",
    "GatedActivation",
    "AddRmsNorm",
)
WHOLE_MODELS = "whole models"
LETTERS = {"executed": "X", "emulated": "E", "launched": "L", "compiled": "C"}
BODIES = {"node": "Node", "web": "Chromium"}
"""Targets that run function bodies, and in what."""
HOST_FEATURES = ("avx2", "fma")
"""Taken for this machine's: what it has besides differs from one to the next."""

# Architecture and runtime to the instruction sets, best first: the features that each needs, and its name.
CODES = {
    ("x86_64", "ort"): (({"avx512_vnni", "avx512vl"}, "avx512vnni"), ({"avx_vnni"}, "avxvnni"), ({"avx2"}, "avx2")),
    ("x86_64", "tvm"): (({"avx512_vnni", "avx512vl", "avx2", "fma"}, "avx512vnni"), ({"avx2", "fma"}, "avx2")),
    ("aarch64", "ort"): (({"i8mm", "asimddp"}, "neoni8mm"), ({"asimddp"}, "neondot"), (set(), "neon")),
    ("aarch64", "tvm"): (({"asimddp"}, "neondot"), (set(), "neon")),
}
KERNELS = {"ort": "C++", "tvm": "TVM"}
MODELS = {"ort": "ONNX Runtime, C++ kernels", "tvm": "TVM"}
GPU_KERNELS = {"ort": "CUDA", "tvm": "TVM GPU"}
GPU_MODELS = {"ort": "ONNX Runtime, CUDA kernels", "tvm": "TVM GPU"}
GPU_SOURCES = {"ort": "any", "tvm": "CUDA source"}
"""What the emulation of a GPU runs, for every architecture."""
GPU_ARCHITECTURES = ("sm_80", "sm_87", "sm_89", "sm_90")

Code = tuple[str, str]
"""Backend and instruction set, as in the evidence."""


@dataclass(frozen=True)
class Row:
    """A target with a runtime: ``code`` for people, and where ``kernels`` and ``models`` find their evidence.

    Of several entries of ``compiled`` all must be there. ``bodies``: ops run as their function bodies.
    """

    target: str
    runtime: str
    code: str
    kernels: Code
    models: Code
    compiled: tuple[Code, ...] = ()
    bodies: bool = False


def rows() -> list[Row]:
    """Of every target in ``targets``, with the runtimes that this page is about."""
    found = []
    for path in sorted(TARGETS.glob("*.toml")):
        plain = tomllib.loads(path.read_text("utf-8"))
        if "triple" in plain:  # else a set of ops
            found += [_row(plain, runtime) for runtime in KERNELS if runtime in plain["runtimes"]]
    return found


def _row(plain: dict[str, Any], runtime: str) -> Row:
    name, features = plain["name"], set(plain["features"])
    if name in BODIES:
        bodies = ("ONNX Runtime, function bodies", BODIES[name])
        return Row(name, runtime, BODIES[name], bodies, bodies, bodies=True)
    if "cuda" in features:
        codes = [code for code in GPU_ARCHITECTURES if code in features] or list(GPU_ARCHITECTURES)
        source = GPU_SOURCES[runtime]
        backend = GPU_KERNELS[runtime]
        compiled = tuple((backend, code) for code in codes)
        return Row(name, runtime, ", ".join(codes), (backend, source), (GPU_MODELS[runtime], source), compiled)
    arch = plain["triple"].partition("-")[0]
    if arch == "host":
        arch, features = "x86_64", set(HOST_FEATURES)
    code = next(code for needs, code in CODES[arch, runtime] if needs <= features)
    models = "x86-64" if arch == "x86_64" else f"{arch} {code}"
    return Row(name, runtime, code, (KERNELS[runtime], code), (MODELS[runtime], models))


def lines_of(found: Iterable[dict[str, Any]]) -> list[str]:
    """The table."""
    shown: dict[tuple[str, Code], set[str]] = {}
    for entry in found:
        shown.setdefault((entry["op"], (entry["backend"], entry["code"])), set()).add(entry["how"])
    header = ("target", "runtime", "code", *OPS, WHOLE_MODELS)
    lines = [f"| {' | '.join(header)} |", "|---|---|---|" + ":-:|" * (len(OPS) + 1)]
    for row in rows():
        models = _letters(shown.get((WHOLE_MODELS, row.models), set()))
        cells = ["B" if row.bodies and models else _kernel(shown, op, row) for op in OPS]
        lines.append(f"| {' | '.join((row.target, row.runtime, row.code, *cells, models))} |")
    return lines


def _kernel(shown: dict[tuple[str, Code], set[str]], op: str, row: Row) -> str:
    ways = set(shown.get((op, row.kernels), ()))
    if row.compiled and all("compiled" in shown.get((op, code), ()) for code in row.compiled):
        ways.add("compiled")
    return _letters(ways)


def _letters(ways: set[str]) -> str:
    return "".join(letter for way, letter in LETTERS.items() if way in ways)
