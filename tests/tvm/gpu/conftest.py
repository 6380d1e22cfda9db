"""Makes the modules of this folder, of tests/cuda and the cases of the CPU kernels importable; opens the software devices once."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[2]
sys.path += [str(Path(__file__).parent), str(TESTS / "cuda"), str(TESTS / "kernels")]

from emulated_cuda import EmulatedCuda
from lavapipe import Lavapipe
from pocl import Pocl
from software_device import SoftwareDevice
from swiftshader import browser


@pytest.fixture(scope="session")
def pocl() -> SoftwareDevice:
    return Pocl.open()


@pytest.fixture(scope="session")
def lavapipe() -> SoftwareDevice:
    return Lavapipe.open()


@pytest.fixture(scope="session")
def emulated_cuda() -> SoftwareDevice:
    return EmulatedCuda.open()


@pytest.fixture(scope="session")
def swiftshader() -> Iterator[SoftwareDevice]:
    with browser() as device:
        yield device


@pytest.fixture
def device(request: pytest.FixtureRequest) -> SoftwareDevice:
    """The one that the parameter names."""
    return request.getfixturevalue(request.param)
