"""Makes the modules of this folder, and the cases of the CPU kernels, importable; builds the emulated kernels once."""

import ctypes
import sys
from pathlib import Path

import pytest

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "kernels")]

from emulated_kernels import EmulatedKernels, build_emulated


@pytest.fixture(scope="session")
def emulated() -> EmulatedKernels:
    return EmulatedKernels(ctypes.CDLL(str(build_emulated())))
