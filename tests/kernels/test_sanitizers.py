"""The kernels under sanitizers, in builds that a process of Python cannot load: every op, every variant, several threads."""

import platform
from pathlib import Path

from kernel_cases import OPS, some_cases, threaded_cases_of
from kernel_runs import Runner, build_runner

QUICKLY_BUILT = ("-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O1")  # most of the time goes into compiling


def test_address_and_undefined_behaviour(tmp_path: Path) -> None:
    """On x86 also the VNNI variants, their intrinsics emulated: nowhere else does anything watch what they touch."""
    emulate = platform.machine() == "x86_64"
    options = ("-DQSK_SANITIZE=address,undefined", f"-DQSK_EMULATE_VNNI={'ON' if emulate else 'OFF'}")
    runner = Runner(build_runner("asan", *options, *QUICKLY_BUILT))
    variants = runner.variants()[1]
    assert not emulate or {"avx2", "avxvnni", "avx512vnni"} <= set(variants)
    for variant in variants:
        runner.check(variant, some_cases(), tmp_path)


def test_data_races(tmp_path: Path) -> None:
    runner = Runner(build_runner("tsan", "-DQSK_SANITIZE=thread", *QUICKLY_BUILT))
    for variant in runner.variants()[1]:
        for op in set(OPS) - {"gather"}:  # which copies rows on the caller's thread
            threaded = runner.check(variant, threaded_cases_of(op), tmp_path).threaded
            assert threaded >= 3, f"{op}: {threaded} cases took more than one thread"
