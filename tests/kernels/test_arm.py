"""The NEON variants, cross-compiled and run under qemu: a processor without the dot product, with it, and with i8mm."""

from pathlib import Path

import pytest
from kernel_cases import some_cases
from kernel_runs import ROOT, Runner, build_runner, tool

SYSROOT = "/usr/aarch64-linux-gnu"


@pytest.fixture(scope="module")
def program() -> Path:
    tool("aarch64-linux-gnu-g++", "g++-aarch64-linux-gnu (apt)")
    return build_runner("aarch64", f"-DCMAKE_TOOLCHAIN_FILE={ROOT / 'cmake' / 'aarch64-linux-gnu.cmake'}")


def runner_on(cpu: str, program: Path) -> Runner:
    return Runner(program, (tool("qemu-aarch64", "qemu-user (apt)"), "-L", SYSROOT, "-cpu", cpu))


def test_without_dot_product(program: Path, tmp_path: Path) -> None:
    runner = runner_on("cortex-a53", program)
    assert runner.variants() == ("neon", ["generic", "neon"])
    for variant in ("generic", "neon"):
        runner.check(variant, some_cases(), tmp_path)


def test_with_dot_product(program: Path, tmp_path: Path) -> None:
    runner = runner_on("cortex-a76", program)
    assert runner.variants() == ("neondot", ["generic", "neon", "neondot"])
    for variant in ("neon", "neondot"):
        runner.check(variant, some_cases(), tmp_path)


def test_with_matrix_products(program: Path, tmp_path: Path) -> None:
    runner = runner_on("max", program)
    assert runner.variants() == ("neoni8mm", ["generic", "neon", "neondot", "neoni8mm"])
    runner.check("neoni8mm", some_cases(), tmp_path)


def test_matrix_products_are_refused_where_they_are_missing(program: Path) -> None:
    done = runner_on("cortex-a76", program).start("--variants", variant="neoni8mm")
    assert done.returncode == 1
    assert "QSPARSE_VARIANT=neoni8mm cannot run on this machine; supported here: generic neon neondot" in done.stderr


def test_dot_product_is_refused_where_it_is_missing(program: Path) -> None:
    done = runner_on("cortex-a53", program).start("--variants", variant="neondot")
    assert done.returncode == 1
    assert "QSPARSE_VARIANT=neondot cannot run on this machine; supported here: generic neon" in done.stderr


def test_x86_variants_are_refused(program: Path) -> None:
    done = runner_on("cortex-a76", program).start("--variants", variant="avx2")
    assert done.returncode == 1
    assert "QSPARSE_VARIANT=avx2 cannot run on this machine" in done.stderr
