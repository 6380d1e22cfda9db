"""The kernels under sanitizers, in builds that a process of Python cannot load."""

from pathlib import Path

from kernel_cases import Ternary, some_cases
from kernel_runs import Runner, build_runner


def test_address_and_undefined_behaviour(tmp_path: Path) -> None:
    runner = Runner(build_runner("asan", "-DQSK_SANITIZE=address,undefined", "-DCMAKE_BUILD_TYPE=RelWithDebInfo"))
    for variant in runner.variants()[1]:
        runner.check(variant, some_cases(), tmp_path)


def test_data_races(tmp_path: Path) -> None:
    runner = Runner(build_runner("tsan", "-DQSK_SANITIZE=thread", "-DCMAKE_BUILD_TYPE=RelWithDebInfo"))
    threaded = [case for case in some_cases() if not isinstance(case, Ternary) or case.workers > 1]
    runner.check(runner.variants()[0], threaded, tmp_path)
