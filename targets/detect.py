"""What the machine that this runs on is: triple, instruction-set extensions, cores, memory and caches."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from qsparse_export.targets.features import CPU_FEATURES

_CACHE_FOLDER = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Host:
    """This machine: ``arch`` and ``system`` as ``uname`` prints them, ``features`` by their Linux names.

    Sizes are in bytes, 0 where the system does not tell; caches are what one core sees.
    """

    arch: str
    system: str
    features: frozenset[str]
    cores: int
    memory_bytes: int
    l1d_cache_bytes: int
    l2_cache_bytes: int
    l3_cache_bytes: int

    @property
    def triple(self) -> str:
        """The compiler's name for programs of this machine."""
        return f"{self.arch}-{ {'linux': 'unknown-linux-gnu', 'darwin': 'apple-darwin'}.get(self.system, self.system) }"


def host() -> Host:
    """Reads the machine; features are those that the operating system reports as usable."""
    arch = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    caches = _cache_bytes()
    return Host(
        arch=arch,
        system=platform.system().lower(),
        features=_features(),
        cores=os.cpu_count() or 0,
        memory_bytes=_memory_bytes(),
        l1d_cache_bytes=caches.get(1, 0),
        l2_cache_bytes=caches.get(2, 0),
        l3_cache_bytes=caches.get(3, 0),
    )


def _features() -> frozenset[str]:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return frozenset()
    for line in cpuinfo.read_text("utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split()) & CPU_FEATURES
    return frozenset()


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 0


def _cache_bytes() -> dict[int, int]:
    """Level to bytes of the data and unified caches of the first core."""
    found: dict[int, int] = {}
    for folder in sorted(_CACHE_FOLDER.glob("index*")):
        try:
            kind, level = (folder / "type").read_text().strip(), int((folder / "level").read_text())
            size = re.fullmatch(r"(\d+)([KMG]?)", (folder / "size").read_text().strip())
        except (OSError, ValueError):
            continue
        if kind in ("Data", "Unified") and size:
            found[level] = int(size[1]) * _UNITS[size[2]]
    return found
