"""Bundles run by JavaScript: in Node, and on the sample's page in headless Chromium; says what is missing and how to get it."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parents[1]
SAMPLE = ROOT / "samples" / "04_web"
PACKAGES = (SAMPLE, TESTS)
TIMEOUT_S = 300


def tool(name: str, package: str) -> str:
    """The path of a program; fails with what to install."""
    found = shutil.which(name)
    if found is None:
        pytest.fail(f"{name} is missing, which this test needs: apt-get install {package}", pytrace=False)
    return found


def require_packages(folder: Path) -> None:
    """Fails unless ``npm ci`` installed what the folder's package-lock.json says, with the command that does."""
    lock = folder / "package-lock.json"
    installed = folder / "node_modules" / ".package-lock.json"
    if not installed.is_file():
        pytest.fail(f"its packages are missing: npm ci --prefix {folder.relative_to(ROOT)}", pytrace=False)
    wanted = {name: entry.get("version") for name, entry in _packages(lock).items() if name}
    if wanted != {name: entry.get("version") for name, entry in _packages(installed).items()}:
        pytest.fail(f"its packages are not those of {lock}: npm ci --prefix {folder.relative_to(ROOT)}", pytrace=False)


def _packages(lock: Path) -> dict[str, dict[str, Any]]:
    return json.loads(lock.read_text("utf-8"))["packages"]


def node(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a script of ours in Node."""
    program = tool("node", "nodejs npm")
    for folder in PACKAGES:
        require_packages(folder)
    return subprocess.run([program, str(script), *arguments], capture_output=True, text=True, timeout=TIMEOUT_S)


def printed(result: subprocess.CompletedProcess[str]) -> Any:
    """The JSON that a script printed, which must have succeeded."""
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def browse(bundles: Path, *steps: dict[str, Any]) -> list[Any]:
    """What each step of run_browser.mjs gave on the sample's page, with the bundles in a folder served as bundles/NAME."""
    chromium = tool("chromium", "chromium")
    with _served({"/tests/": TESTS, "/bundles/": bundles, "/": SAMPLE}) as url:
        return printed(node(TESTS / "run_browser.mjs", chromium, url, json.dumps(steps)))


@contextlib.contextmanager
def _served(folders: dict[str, Path]) -> Iterator[str]:
    """The URL of Python's own http.server on this machine; each folder under its prefix, the first that fits."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Folders, folders))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Folders(SimpleHTTPRequestHandler):
    def __init__(self, folders: dict[str, Path], *arguments: Any) -> None:
        self._folders = folders
        super().__init__(*arguments)

    def translate_path(self, path: str) -> str:
        prefix = next(prefix for prefix in self._folders if path.startswith(prefix))
        self.directory = str(self._folders[prefix])
        return super().translate_path("/" + path.removeprefix(prefix))

    def log_message(self, format: str, *arguments: Any) -> None:
        """Says nothing: a page that fails says so itself."""
