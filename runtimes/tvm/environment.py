"""Whether TVM can be used here: imports it, or says what to install."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from qsparse_export.errors import TargetError, UsageError
from qsparse_export.runtimes import switches

VERSIONS = {"apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.14.post0"}
"""The versions that the extra [tvm] pins: TVM's importer and its pass names change from release to release."""

_INSTALL = "install what this version was made for with: pip install 'qsparse-export[tvm]'"
_THREADS_VARIABLE = "TVM_NUM_THREADS"
_SPIN_VARIABLE = "TVM_THREAD_POOL_SPIN_COUNT"
_SHARE_ALL_CORES = (
    -3
)  # tvm::runtime::threading::ThreadGroup::kSpecifyThreadShareAllCore: workers are not bound to a core each


def require_tvm() -> None:
    """TargetError, before TVM is imported, where it is missing or not of the versions that this package was made for."""
    for package, wanted in VERSIONS.items():
        try:
            found = version(package)
        except PackageNotFoundError:
            raise TargetError(f"the runtime tvm needs {package}, which is not installed; {_INSTALL}") from None
        if package == "apache-tvm-ffi" and found.startswith("0.1.15."):
            raise TargetError(
                f"apache-tvm-ffi {found} crashes the process (a segmentation fault in save_json) with apache-tvm "
                f"{VERSIONS['apache-tvm']}; {_INSTALL}"
            )
        if found != wanted:
            raise TargetError(f"the runtime tvm is made for {package} {wanted}, and {found} is installed; {_INSTALL}")


@cache
def tvm() -> Any:
    """The module ``tvm``, imported with a thread pool for every core; TargetError as :func:`require_tvm`."""
    require_tvm()
    # The pool's size is read once, when the first kernel runs; TVM's own choice is half the cores that the system reports.
    os.environ.setdefault(_THREADS_VARIABLE, str(os.cpu_count() or 1))
    # A thread that spins between kernels takes the core that another program needs; QSPARSE_SPIN=1 leaves TVM its own choice.
    if not switches.is_on(switches.SPIN, otherwise=False):
        os.environ.setdefault(_SPIN_VARIABLE, "0")
    with _without_torch():
        import tvm as module

    return module


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """TVM imports PyTorch where it is installed, 4 of its 6 seconds, for conversions that nothing here asks for."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # which makes an import fail as if it were not installed
    try:
        yield
    finally:
        del sys.modules["torch"]


def use_threads(count: int | None) -> None:
    """Lets the calling thread's kernels run on ``count`` threads from now on (None: all cores).

    TVM keeps one pool per calling thread. TargetError for more threads than the pool was made with, UsageError where the
    environment gives no number for that.
    """
    text = os.environ[_THREADS_VARIABLE]
    if not text.isdecimal() or not int(text):
        raise UsageError(f"{_THREADS_VARIABLE} is {text!r}; expected a number of threads from 1 on")
    most = int(text)
    wanted = most if count is None else count
    if wanted > most:
        raise TargetError(
            f"{wanted} threads, and TVM's pool has {most}: set {_THREADS_VARIABLE}={wanted} in the environment, "
            "or choose fewer"
        )
    if getattr(_used, "threads", None) != wanted:
        configure_pool(tvm().get_global_func("runtime.config_threadpool"), wanted)
        _used.threads = wanted


def configure_pool(config_threadpool: Callable[[int, int], object], count: int) -> None:
    """Calls ``config_threadpool``, TVM's function of that name here or on a device, for ``count`` threads."""
    config_threadpool(_SHARE_ALL_CORES, count)


_used = threading.local()
