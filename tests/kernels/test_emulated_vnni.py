"""The VNNI variants on machines without VNNI: the same sources, their intrinsics emulated by SIMDe (libsimde-dev).

Machines with AVX-512 or AVX-VNNI also run them for real, in test_variants.py.
"""

import platform
import re
import subprocess
from pathlib import Path

import pytest
from evidence import EMULATED, OP_NAMES, Evidence, Record
from kernel_cases import OPS, some_cases_of
from kernel_runs import Runner, build_runner, tool

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulation is built from x86 intrinsics")


@pytest.fixture(scope="module")
def runner() -> Runner:
    if not Path("/usr/include/simde/x86/avx512.h").exists():
        pytest.fail("SIMDe's headers are missing, which this test needs: install libsimde-dev (apt)", pytrace=False)
    return Runner(build_runner("vnni-emulated", "-DQSK_EMULATE_VNNI=ON"))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("variant", ("avxvnni", "avx512vnni"))
def test_emulated(runner: Runner, variant: str, op: str, tmp_path: Path, evidence: Record) -> None:
    assert runner.variants()[0] == "avx512vnni"
    share = runner.check(variant, some_cases_of(op), tmp_path).error_share
    evidence(Evidence(OP_NAMES[op], "C++", variant, EMULATED, "SIMDe", share))


def test_avx_vnni_is_compiled_without_avx512() -> None:
    """What the emulation cannot show: the real object dots in VEX encoding, on no register that AVX-512 brought."""
    program = build_runner("release")
    (compiled,) = program.parents[2].glob("runtimes/kernels/**/ternary_avxvnni.cc.o")
    command = [tool("objdump", "binutils"), "-d", "--no-show-raw-insn", str(compiled)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert listed.count("{vex} vpdpbusd") >= 32
    assert re.search(r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])\b", listed) is None
