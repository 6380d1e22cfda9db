"""Makes ``emulation`` importable from the tests of this folder; bundles for ARM, and processors to run them on."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from counting_models import MODELS, trained
from emulation import Emulator, onnxruntime_for_arm

import qsparse_export as qs
from qsparse_export.bundle import Bundle


@pytest.fixture(scope="session", autouse=True)
def kept_builds(build_cache: None) -> None:
    """Every test here uses the cache."""


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory, build_cache: None) -> Callable[[str], Bundle]:
    """The model called so, trained for some steps, exported for arm64 with the bench program; once a session."""
    made: dict[str, Bundle] = {}

    def make(name: str) -> Bundle:
        if name not in made:
            folder = tmp_path_factory.mktemp(name) / "bundle"
            made[name] = qs.export(trained(MODELS[name]), target="arm64", out=folder, name=name, with_bench=True)
        return made[name]

    return make


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Emulator]:
    """The processor called so."""
    made: dict[str, Emulator] = {}

    def make(cpu: str) -> Emulator:
        if cpu not in made:
            made[cpu] = Emulator.of(cpu, tmp_path_factory.mktemp(cpu))
        return made[cpu]

    return make


@pytest.fixture(scope="session")
def onnxruntime() -> Path:
    return onnxruntime_for_arm()
