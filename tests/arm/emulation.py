"""ONNX Runtime's own ARM library and our programs for ARM, run here under qemu; says what is missing and how to get it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from wheels import ARM, file_of_wheel

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "arm"
CROSS_LIBRARIES = Path("/usr/aarch64-linux-gnu/lib")
PLUGIN = Path(__file__).with_name("count_instructions.c")

# What Linux tells of these processors. ONNX Runtime reads it and chooses its kernels by it, and crashes where it finds
# the emulating machine's own instead.
_CPUINFO = """\
processor\t: 0
BogoMIPS\t: 100.00
Features\t: {features}
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: {part}
CPU revision\t: 1

"""
_ARMV8_0 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
PROCESSORS = {
    "cortex-a53": (_ARMV8_0, "0xd03"),
    "cortex-a72": (_ARMV8_0, "0xd08"),  # of the Raspberry Pi 4
    "cortex-a76": (f"{_ARMV8_0} atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp", "0xd0b"),
}


def tool(name: str, package: str) -> str:
    """The path of a program; fails with what to install."""
    found = shutil.which(name)
    if found is None:
        pytest.fail(f"{name} is missing, which this test needs: apt-get install {package}", pytrace=False)
    return found


def onnxruntime_for_arm() -> Path:
    """libonnxruntime.so for 64-bit ARM of the installed version, from its wheel on PyPI, once into .cache/arm."""
    wanted = version("onnxruntime")
    name = f"libonnxruntime.so.{wanted}"
    return file_of_wheel(f"onnxruntime=={wanted}", f"onnxruntime/capi/{name}", CACHE / name, *ARM)


def instruction_counter() -> Path:
    """The qemu plugin that counts instructions, compiled for the interface that this qemu speaks."""
    qemu = tool("qemu-aarch64", "qemu-user")
    said = subprocess.run([qemu, "--version"], capture_output=True, text=True, check=True).stdout
    major = int(said.split("version ")[1].split(".")[0])
    built = CACHE / f"libcount_instructions-{major}.so"
    CACHE.mkdir(parents=True, exist_ok=True)
    if not built.is_file() or built.stat().st_mtime < PLUGIN.stat().st_mtime:
        partial = built.with_suffix(f".{os.getpid()}.partial")
        # qemu 9 ended version 1 of its plugin interface.
        flags = ["-O2", "-shared", "-fPIC", f"-DPLUGIN_API={1 if major < 9 else 2}"]
        subprocess.run([tool("gcc", "gcc"), *flags, "-o", str(partial), str(PLUGIN)], check=True)
        os.replace(partial, built)
    return built


@dataclass(frozen=True)
class Result:
    """What a program printed as JSON, what it said, and how many instructions it executed (None: not counted)."""

    exit_code: int
    printed: Any
    said: str
    instructions: int | None


@dataclass(frozen=True)
class Emulator:
    """One ARM processor; ``root`` is where its programs find libraries and what the kernel tells of the machine."""

    cpu: str
    root: Path

    @staticmethod
    def of(cpu: str, root: Path) -> Emulator:
        features, part = PROCESSORS[cpu]
        processors = root / "sys" / "devices" / "system" / "cpu"
        processors.mkdir(parents=True)
        for name in ("possible", "present", "online"):
            (processors / name).write_text("0\n")
        (root / "proc").mkdir()
        (root / "proc" / "cpuinfo").write_text(_CPUINFO.format(features=features, part=part))
        (root / "lib").symlink_to(CROSS_LIBRARIES)
        return Emulator(cpu, root)

    def run(self, program: Path, *arguments: object, count: bool = False, variant: str = "") -> Result:
        """Runs an ARM program; with ``count`` its instructions are counted."""
        command = [tool("qemu-aarch64", "qemu-user"), "-L", str(self.root), "-cpu", self.cpu]
        if count:
            command += ["-plugin", str(instruction_counter())]
        command += [str(program), *map(str, arguments)]
        environment = dict(os.environ, QSPARSE_VARIANT=variant)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
        printed = json.loads(done.stdout) if done.stdout.startswith("{") else done.stdout
        counted = [int(line.split()[1]) for line in done.stderr.splitlines() if line.startswith("instructions ")]
        assert len(counted) == count, done.stderr
        return Result(done.returncode, printed, done.stderr, counted[0] if counted else None)
