"""SwiftShader in headless Chromium: WGSL as a browser takes it, compiled by Tint, on this machine's CPU."""

from __future__ import annotations

import base64
import json
import queue
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from device_kernels import DeviceKernel, device_kernels
from software_device import missing, sizes_of, tensors_before

from qsparse_export.runtimes.tvm.gpu.program import Program

PAGE = Path(__file__).with_name("kernels_page.html")
FLAGS = ("--headless", "--no-sandbox", "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader")
QUIET = ("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")
MOST_SECONDS = 120


@dataclass
class Swiftshader:
    """Jobs go to the page and results come from it through a server on loopback."""

    jobs: queue.Queue[bytes] = field(default_factory=queue.Queue)
    results: queue.Queue[bytes] = field(default_factory=queue.Queue)

    def run(self, program: Program, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tensors = tensors_before(program, inputs)
        sizes = sizes_of(program, inputs)
        kernels = [_launch(kernel, sizes) for kernel in device_kernels(program, "webgpu")]
        encoded = {name: base64.b64encode(tensor.tobytes()).decode() for name, tensor in tensors.items()}
        self.jobs.put(json.dumps({"tensors": encoded, "kernels": kernels}).encode())
        result = json.loads(self.results.get(timeout=MOST_SECONDS))
        assert "error" not in result, result["error"]
        return {
            name: np.frombuffer(base64.b64decode(result["tensors"][name]), tensor.dtype)[: tensor.size].reshape(
                tensor.shape
            )
            for name, tensor in tensors.items()
        }


def _launch(kernel: DeviceKernel, sizes: dict[str, int]) -> dict[str, object]:
    launch = kernel.launch(sizes)
    return {
        "name": kernel.name,
        "source": kernel.source,
        "tensors": [each for each in launch.arguments if isinstance(each, str)],
        "numbers": launch.numbers,
        "blocks": [launch.blocks_x, launch.blocks_y],
    }


@contextmanager
def browser() -> Iterator[Swiftshader]:
    """One that has opened the page. Fails the test where there is no Chromium."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.fail(missing("Chromium", "it is not on the path", ["apt-get install chromium"]), pytrace=False)
    device = Swiftshader()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/job":
                self.answer(device.jobs.get(), "application/json")
            else:
                self.answer(PAGE.read_bytes(), "text/html")

        def do_POST(self) -> None:
            device.results.put(self.rfile.read(int(self.headers["Content-Length"])))
            self.answer(b"", "text/plain")

        def answer(self, body: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server,
    ):
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        command = [chromium, *FLAGS, *QUIET, f"--user-data-dir={profile}", url]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield device
        finally:
            process.terminate()
            process.wait()
            server.shutdown()
