"""The NEON variants, cross-compiled and run under qemu: a processor without the dot product, with it, and with i8mm."""

from pathlib import Path

import pytest
from evidence import EMULATED, OP_NAMES, Evidence, Record
from kernel_cases import OPS, some_cases_of
from kernel_runs import ROOT, Runner, build_runner, tool

SYSROOT = "/usr/aarch64-linux-gnu"


@pytest.fixture(scope="module")
def program() -> Path:
    tool("aarch64-linux-gnu-g++", "g++-aarch64-linux-gnu (apt)")
    return build_runner("aarch64", f"-DCMAKE_TOOLCHAIN_FILE={ROOT / 'cmake' / 'aarch64-linux-gnu.cmake'}")


def runner_on(cpu: str, program: Path) -> Runner:
    return Runner(program, (tool("qemu-aarch64", "qemu-user (apt)"), "-L", SYSROOT, "-cpu", cpu))


CHOSEN = {"cortex-a53": "neon", "cortex-a76": "neondot", "max": "neoni8mm"}
"""The best variant of each emulated processor."""


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("cpu", "variant"),
    [
        ("cortex-a53", "generic"),
        ("cortex-a53", "neon"),
        ("cortex-a76", "neon"),
        ("cortex-a76", "neondot"),
        ("max", "neoni8mm"),
    ],
)
def test_cases(cpu: str, variant: str, op: str, program: Path, tmp_path: Path, evidence: Record) -> None:
    share = runner_on(cpu, program).check(variant, some_cases_of(op), tmp_path).error_share
    evidence(Evidence(OP_NAMES[op], "C++", variant, EMULATED, f"qemu {cpu}", share))


@pytest.mark.parametrize("cpu", CHOSEN)
def test_the_best_variant_is_chosen(cpu: str, program: Path) -> None:
    chosen, supported = runner_on(cpu, program).variants()
    assert chosen == CHOSEN[cpu]
    assert supported == ["generic", *list(CHOSEN.values())[: list(CHOSEN).index(cpu) + 1]]


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
