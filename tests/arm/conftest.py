"""Makes ``emulation`` importable from the tests of this folder; bundles for ARM, and processors to run them on."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from counting_models import MODELS, trained
from emulation import ROOT, Emulator, onnxruntime_for_arm

import qsparse_export as qs
from qsparse_export.bundle import Bundle


@pytest.fixture(scope="session", autouse=True)
def build_cache() -> Iterator[None]:
    """Cross-compiled libraries are kept in the project's own .cache."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(ROOT / ".cache" / "xdg")
    yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before


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
