"""ONNX Runtime's headers: given, or brought by the build itself, which says from where."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
FETCH = ROOT / "cmake" / "fetch_onnxruntime_headers.py"


@pytest.fixture(scope="module")
def fetched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("headers")
    done = subprocess.run(
        [sys.executable, str(FETCH), "--output", str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_headers_are_brought_and_named(fetched: tuple[Path, str]) -> None:
    folder, said = fetched
    assert re.match(
        r"Debian \w+, libonnxruntime-dev_\S+\.deb, from this machine's own mirror|the official release archive", said
    )
    version = re.search(r"#define ORT_API_VERSION (\d+)", (folder / "onnxruntime_c_api.h").read_text())
    assert version
    assert int(version[1]) >= 18
    assert (folder / "onnxruntime_cxx_api.h").is_file()


def configure(tmp_path: Path, include: Path) -> subprocess.CompletedProcess[str]:
    """Only the part of the build that looks for the headers."""
    (tmp_path / "CMakeLists.txt").write_text(
        f'cmake_minimum_required(VERSION 3.20)\nproject(probe NONE)\ninclude("{ROOT}/cmake/OnnxRuntimeHeaders.cmake")\n'
    )
    beside = Path(sys.executable).parent / "cmake"
    cmake = str(beside) if beside.exists() else "cmake"
    command = [cmake, "-S", str(tmp_path), "-B", str(tmp_path / "build"), f"-DONNXRUNTIME_INCLUDE_DIR={include}"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_given_folder_is_used_and_named(tmp_path: Path, fetched: tuple[Path, str]) -> None:
    done = configure(tmp_path, fetched[0])
    assert done.returncode == 0, done.stderr
    assert re.search(r"ONNX Runtime headers: API \d+, given by -DONNXRUNTIME_INCLUDE_DIR", done.stdout)


def test_given_folder_without_headers_is_refused(tmp_path: Path) -> None:
    done = configure(tmp_path, tmp_path)
    assert done.returncode != 0
    assert "has no onnxruntime_c_api.h" in " ".join(done.stderr.split())


def test_headers_that_are_too_old_are_refused(tmp_path: Path) -> None:
    (tmp_path / "onnxruntime_c_api.h").write_text("#define ORT_API_VERSION 17\n")
    done = configure(tmp_path, tmp_path)
    assert done.returncode != 0
    assert "have API 17; 18 or newer is needed" in " ".join(done.stderr.split())
