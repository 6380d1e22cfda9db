"""The AVX-512 VNNI variant on machines without AVX-512: the same source, its intrinsics emulated by SIMDe (libsimde-dev).

Machines with AVX-512 also run it for real, in test_variants.py.
"""

import platform
from pathlib import Path

import pytest
from kernel_cases import some_cases
from kernel_runs import Runner, build_runner


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulation is built from x86 intrinsics")
def test_emulated_avx512(tmp_path: Path) -> None:
    if not Path("/usr/include/simde/x86/avx512.h").exists():
        pytest.fail("SIMDe's headers are missing, which this test needs: install libsimde-dev (apt)", pytrace=False)
    runner = Runner(build_runner("avx512-emulated", "-DQSK_EMULATE_AVX512=ON"))
    assert runner.variants()[0] == "avx512vnni"
    runner.check("avx512vnni", some_cases(), tmp_path)
