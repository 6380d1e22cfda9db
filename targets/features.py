"""Names of the instruction-set extensions that target files and kernels speak of: Linux's own, and NVIDIA's."""

from __future__ import annotations

# Everything else of /proc/cpuinfo is left out, so that a manifest names what matters.
_X86_64 = frozenset(
    [
        "sse4_2",
        "fma",
        "f16c",
        "avx2",
        "avx_vnni",
        "avx512f",
        "avx512bw",
        "avx512cd",
        "avx512dq",
        "avx512vl",
        "avx512_vnni",
    ]
)
_AARCH64 = frozenset(["asimd", "asimddp", "asimdhp", "fphp", "crc32", "i8mm", "bf16", "sve"])
_WASM32 = frozenset(["simd128"])
GPU_FEATURES = frozenset(["cuda", "sm_80", "sm_87", "sm_89", "sm_90"])

CPU_FEATURES = _X86_64 | _AARCH64
FEATURES_OF: dict[str, frozenset[str]] = {
    "x86_64": _X86_64 | GPU_FEATURES,
    "aarch64": _AARCH64 | GPU_FEATURES,
    "wasm32": _WASM32,
    "any": frozenset(),
}
"""Architecture to the features that a target of it may name; a GPU is a feature of the machine that it is in."""

IMPLIED: dict[str, str] = {
    "avx_vnni": "avx2",
    "avx512f": "avx2",
    "avx512bw": "avx512f",
    "avx512cd": "avx512f",
    "avx512dq": "avx512f",
    "avx512vl": "avx512f",
    "avx512_vnni": "avx512f",
    "asimddp": "asimd",
    "asimdhp": "asimd",
    "i8mm": "asimd",
    "sve": "asimd",
    "sm_80": "cuda",
    "sm_87": "cuda",
    "sm_89": "cuda",
    "sm_90": "cuda",
}
"""Feature to one that every processor with it has too."""
