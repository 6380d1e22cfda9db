"""A target as TVM's compiler knows it, and the kernels' instruction set for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qsparse_export.errors import TargetError
from qsparse_export.runtimes.tvm.environment import tvm
from qsparse_export.runtimes.tvm.lanes import AVX2, AVX512_VNNI, GENERIC, NEON, NEON_DOT, Lanes

if TYPE_CHECKING:
    from qsparse_export.targets.target import Target

_LLVM_FEATURES: dict[str, str] = {
    "sse4_2": "sse4.2",
    "fma": "fma",
    "f16c": "f16c",
    "avx2": "avx2",
    "avx_vnni": "avxvnni",
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512cd": "avx512cd",
    "avx512dq": "avx512dq",
    "avx512vl": "avx512vl",
    "avx512_vnni": "avx512vnni",
    "asimd": "neon",
    "asimddp": "dotprod",
    "asimdhp": "fullfp16",
    "crc32": "crc",
    "i8mm": "i8mm",
    "bf16": "bf16",
}
"""Linux's name of a feature to LLVM's. SVE is left out: no kernel is written for vectors of unknown length."""

_ARCHITECTURES: dict[str, tuple[tuple[frozenset[str], Lanes], ...]] = {
    "x86_64": (
        (frozenset({"avx512_vnni", "avx512vl", "avx2", "fma"}), AVX512_VNNI),
        (frozenset({"avx2", "fma"}), AVX2),
        (frozenset(), GENERIC),
    ),
    "aarch64": ((frozenset({"asimddp"}), NEON_DOT), (frozenset(), NEON)),
}
"""Architecture to the instruction sets that it may have, best first, with the features that each needs."""


GPU_ARCHITECTURES = ("sm_80", "sm_87", "sm_89", "sm_90")
"""Of NVIDIA: what machine code is made for."""


def is_gpu(target: Target) -> bool:
    """Whether code for ``target`` runs on its GPU."""
    return "cuda" in target.features


def gpu_architectures(target: Target) -> tuple[str, ...]:
    """The GPUs that ``target`` means: the one that it names, or all."""
    return tuple(name for name in GPU_ARCHITECTURES if name in target.features) or GPU_ARCHITECTURES


def lanes_of(target: Target) -> Lanes:
    """The best instruction set of ``target``; TargetError for an architecture without kernels."""
    if target.arch not in _ARCHITECTURES:
        raise TargetError(
            f"target {target.name} is {target.arch}, and the runtime tvm has CPU kernels for "
            f"{' and '.join(_ARCHITECTURES)}: choose another runtime"
        )
    return next(lanes for needs, lanes in _ARCHITECTURES[target.arch] if needs <= target.features)


def tvm_target(target: Target) -> Any:
    """The ``tvm.target.Target`` of a CPU."""
    attributes = sorted(f"+{_LLVM_FEATURES[feature]}" for feature in target.features if feature in _LLVM_FEATURES)
    return tvm().target.Target({"kind": "llvm", "mtriple": target.triple, "mattr": attributes})


def runs_here(target: Target) -> bool:
    """Whether this machine has all that code for ``target`` may use."""
    from qsparse_export.targets.detect import host

    here = host()
    return target.triple == here.triple and target.features <= here.features
