"""What TVM raises where CUDA fails, as one error; and a process that outlives it."""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Iterator

from qsparse_export.runtimes.gpu_failure import gpu_failure, is_out_of_memory

_OF_CUDA = re.compile(r"\bCUDA|\bcuda[A-Z]")
"""In the words of TVM 0.27: "CUDA Runtime Error: ...", "CUDALaunch Error: ...", names of CUDA's functions."""


@contextlib.contextmanager
def gpu_failures() -> Iterator[None]:
    """Turns what CUDA refuses inside into a TargetError; other errors pass.

    A GPU that is gone cannot free memory either, and TVM ends the process (std::terminate) where that fails as a tensor
    goes. So the error is never let go of, and with it none of the tensors that the failed call and its callers hold.
    """
    try:
        yield
    except RuntimeError as error:
        said = str(error)
        if not _OF_CUDA.search(said):
            raise
        failure = gpu_failure(said, "or export the model with --target cpu")
        if not is_out_of_memory(said):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(failure))
        raise failure from error
