"""A target file to alter."""

from collections.abc import Callable
from pathlib import Path

import pytest

BOARD = {
    "name": '"board"',
    "description": '"a board"',
    "triple": '"aarch64-unknown-linux-gnu"',
    "features": '["asimd"]',
    "native_ops": '"cpu-kernels"',
    "library": '"built"',
    "runtimes": '["ort"]',
    "dtypes": '["float32", "float16"]',
}


@pytest.fixture
def board(tmp_path: Path) -> Callable[..., str]:
    """Writes a target file, a valid one but for ``changes`` (None leaves a field out); gives its path."""

    def write(**changes: str | None) -> str:
        values = {name: value for name, value in (BOARD | changes).items() if value is not None}
        path = tmp_path / "board.toml"
        path.write_text("".join(f"{name} = {value}\n" for name, value in values.items()))
        return str(path)

    return write
