"""Makes the modules of this folder, of tests/cuda and of tests/kernels importable; opens the software devices once."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path += [str(Path(__file__).parent), *(str(Path(__file__).parents[2] / name) for name in ("cuda", "kernels"))]

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


@pytest.fixture(scope="module")
def swiftshader() -> Iterator[SoftwareDevice]:
    """Not for the session: a browser takes a twentieth of a core while it waits."""
    with browser() as device:
        yield device


@pytest.fixture
def device(request: pytest.FixtureRequest) -> SoftwareDevice:
    """The one that the parameter names."""
    return request.getfixturevalue(request.param)
