"""The library for another machine: built once per content, kept whole or not at all, the same bytes everywhere."""

import re
import shutil
from pathlib import Path

import pytest

from qsparse_export.errors import TargetError
from qsparse_export.runtimes.ort import bundled, cross_build
from qsparse_export.runtimes.ort.library import DEVICE_BENCH_NAME, LIBRARY_NAME, library_path, needed_glibc
from qsparse_export.targets.target import load_target

ARM = ("raspberry-pi-5", "aarch64-unknown-linux-gnu", "linux")


def machine(file: Path) -> int:
    return int.from_bytes(file.read_bytes()[18:20], "little")


def test_the_bundle_gets_the_library_for_its_target(tmp_path):
    pi, mine = load_target("raspberry-pi-5"), load_target("cpu")
    assert bundled.add_library(pi, tmp_path) == LIBRARY_NAME
    assert machine(tmp_path / LIBRARY_NAME) == 183  # EM_AARCH64
    assert bundled.record(pi)["compiler"].startswith("aarch64-linux-gnu-g++")
    assert bundled.record(pi)["sources_sha256"] == bundled.record(mine)["sources_sha256"]
    assert bundled.add_device_bench(pi, tmp_path) == DEVICE_BENCH_NAME
    assert machine(tmp_path / DEVICE_BENCH_NAME) == 183
    bundled.add_library(mine, tmp_path)
    assert (tmp_path / LIBRARY_NAME).read_bytes() == library_path().read_bytes()


def test_it_runs_on_systems_as_old_as_ubuntu_22_04(tmp_path):
    pi = load_target("raspberry-pi-5")
    for name in (bundled.add_library(pi, tmp_path), bundled.add_device_bench(pi, tmp_path)):
        newest = needed_glibc(tmp_path / name)
        assert (2, 17) <= tuple(map(int, newest.split("."))) <= (2, 35), name  # 2.17 was the first for 64-bit ARM
    assert bundled.record(pi)["needs_glibc"] == needed_glibc(tmp_path / LIBRARY_NAME)


def test_the_second_export_compiles_nothing(monkeypatch):
    first = cross_build.build(*ARM, "library")

    def never(*_: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(cross_build, "_compile", never)
    assert cross_build.build(*ARM, "library") == first
    monkeypatch.setattr(cross_build, "sources_sha256", lambda: "of other sources")
    with pytest.raises(AssertionError, match="compiled again"):
        cross_build.build(*ARM, "library")


def test_same_sources_same_bytes(monkeypatch, tmp_path):
    cached = cross_build.build(*ARM, "library")
    elsewhere = tmp_path / "installed" / "elsewhere"
    shutil.copytree(cross_build.source_folder(), elsewhere)
    monkeypatch.setattr(cross_build, "source_folder", lambda: elsewhere)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    built = cross_build.build(*ARM, "library")
    assert built != cached
    assert built.read_bytes() == cached.read_bytes()
    assert [path.name for path in (tmp_path / "cache" / "qsparse-export" / "built").iterdir()] == [built.parent.name]


def test_a_build_that_fails_says_why_and_keeps_nothing(monkeypatch, tmp_path):
    broken = tmp_path / "sources"
    shutil.copytree(cross_build.source_folder(), broken)
    (broken / "runtimes" / "kernels" / "src" / "cpu.cc").write_text("#error this is broken\n")
    monkeypatch.setattr(cross_build, "source_folder", lambda: broken)
    monkeypatch.setattr(cross_build, "sources_sha256", lambda: "of broken sources")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(TargetError, match=r"could not build the kernel library:(.|\n)*this is broken"):
        cross_build.build(*ARM, "library")
    assert list((tmp_path / "cache" / "qsparse-export" / "built").iterdir()) == []


def test_a_result_for_the_wrong_machine_is_refused(tmp_path):
    with pytest.raises(TargetError, match="for another machine than aarch64-unknown-linux-gnu: ELF machine 62"):
        cross_build._require_machine(library_path(), "aarch64-unknown-linux-gnu")


@pytest.mark.parametrize(
    ("hidden", "packages"),
    [
        ("aarch64-linux-gnu-g++", "package g++-aarch64-linux-gnu"),
        ("cmake", "package cmake"),
        ("all", "packages g++-aarch64-linux-gnu, cmake, make"),
    ],
)
def test_missing_tools_are_named_by_package(monkeypatch, hidden, packages):
    real = shutil.which
    monkeypatch.setattr(
        shutil, "which", lambda name, path=None: None if hidden in (name, "all") else real(name, path=path)
    )
    with pytest.raises(TargetError, match=re.escape(packages) + r"; install with: apt-get install .*--portable"):
        cross_build.require_tools(*ARM)


def test_a_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(TargetError, match=r"cannot keep the library for aarch64.*set XDG_CACHE_HOME"):
        cross_build.build(*ARM, "library")


def test_export_says_which_library_ran(bundle):
    manifest = bundle("qsparse").manifest
    ran = manifest["parity"]["ran_on"]
    assert manifest["library"]["triple"] == "aarch64-unknown-linux-gnu"
    assert ran["library"]["triple"] != manifest["library"]["triple"]
    assert ran["library"]["sources_sha256"] == manifest["library"]["sources_sha256"]
    assert ran["covers_library"] is False
    assert "was not run at export" in ran["note"]
    assert manifest["target"]["triple"] == "aarch64-unknown-linux-gnu"
    assert manifest["target"]["features"] == ["asimd"]
