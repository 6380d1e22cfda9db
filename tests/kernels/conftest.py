"""Makes the modules of this folder importable from the tests of this folder, and loads the library once."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from kernel_runs import Kernels

from qsparse_export.runtimes.ort.library import open_library


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    return Kernels(open_library())
