"""What the machine that this runs on is: architecture, system and instruction-set extensions."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

# The extensions that a kernel variant or a target file asks for; everything else of /proc/cpuinfo is left out, so that
# a manifest names what matters.
_RELEVANT = frozenset(
    [
        "sse4_2",
        "fma",
        "f16c",
        "avx2",
        "avx_vnni",
        "avx512f",
        "avx512bw",
        "avx512vl",
        "avx512dq",
        "avx512_vnni",
        "asimd",
        "asimddp",
        "i8mm",
        "fphp",
        "asimdhp",
        "sve",
    ]
)


@dataclass(frozen=True)
class Host:
    """This machine: ``arch`` and ``system`` as ``uname`` prints them, ``features`` by their Linux names."""

    arch: str
    system: str
    features: frozenset[str]


def host() -> Host:
    """Reads the machine; features are those that the operating system reports as usable."""
    arch = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    return Host(arch, platform.system().lower(), _features())


def _features() -> frozenset[str]:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return frozenset()
    for line in cpuinfo.read_text("utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split()) & _RELEVANT
    return frozenset()
