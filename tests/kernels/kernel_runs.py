"""Two ways to run kernel cases: the library in this process, and a runner program of another build."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from kernel_cases import Case, Quantize, Sparse, Ternary, TopK

from qsparse_export.formats import ternary
from qsparse_export.runtimes.ort.library import Library

ROOT = Path(__file__).resolve().parents[2]
BUILDS = ROOT / "build" / "tests"
TYPES = {np.dtype(np.float32): 1, np.dtype(np.float16): 2}
OPS = {"topk": 0, "quantize": 1, "ternary": 2, "sparse": 3}


class _Parallel(ctypes.Structure):
    _fields_ = (("context", ctypes.c_void_p), ("run", ctypes.c_void_p), ("workers", ctypes.c_int64))


class _TopKArgs(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("block", ctypes.c_int64),
        ("rescale_l2", ctypes.c_int),
    )


class _TernaryArgs(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("x", ctypes.c_void_p),
        ("w", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("y", ctypes.c_void_p),
        ("m", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("n", ctypes.c_int64),
    )


class _SparseArgs(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("x", ctypes.c_void_p),
        ("w", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("n", ctypes.c_void_p),
        ("matrices", ctypes.c_int64),
        ("y", ctypes.c_void_p),
        ("m", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("top_k", ctypes.c_int64),
        ("block", ctypes.c_int64),
        ("rescale_l2", ctypes.c_int),
    )


TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)
RUN = ctypes.CFUNCTYPE(None, ctypes.c_void_p, TASK, ctypes.c_void_p, ctypes.c_int64)


def _run_threads(_context: int, task: Callable[[int, int], None], argument: int, count: int) -> None:
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(lambda i: task(argument, i), range(count)))


_RUN = RUN(_run_threads)


def aligned(byte_count: int) -> np.ndarray:
    memory = np.full(byte_count + 64, 0xA5, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + byte_count]


@dataclass(frozen=True)
class Kernels:
    """The C ABI of the library in this process."""

    library: Library

    def _pointer(self, variant: str) -> int:
        by_name = self.library.handle.qsk_variant_by_name
        by_name.restype = ctypes.c_void_p
        return by_name(variant.encode())

    def _call(
        self, name: str, variant: str, args: ctypes.Structure, workers: int, scratch_bytes: int | None = None
    ) -> int:
        handle = self.library.handle
        needed = getattr(handle, f"{name}_scratch_bytes")
        needed.restype = ctypes.c_int64
        function = getattr(handle, name)
        function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64]
        parallel = _Parallel(None, ctypes.cast(_RUN, ctypes.c_void_p), workers)
        if scratch_bytes is None:
            scratch_bytes = needed(ctypes.byref(args), ctypes.byref(parallel))
        scratch = aligned(max(scratch_bytes, 0))
        pointer = self._pointer(variant)
        return function(pointer, ctypes.byref(args), ctypes.byref(parallel), scratch.ctypes.data, scratch_bytes)

    def topk_status(
        self, case: TopK, y: np.ndarray | None = None, variant: str = "generic", scratch_bytes: int | None = None
    ) -> int:
        y = np.empty_like(case.x) if y is None else y
        rows, width = case.x.shape
        data = (case.x.ctypes.data, y.ctypes.data)
        args = _TopKArgs(TYPES[case.x.dtype], *data, rows, width, case.k, case.block, case.rescale)
        return self._call("qsk_topk_sparsify", variant, args, case.workers, scratch_bytes)

    def topk_into(self, variant: str, case: TopK, y: np.ndarray) -> np.ndarray:
        assert self.topk_status(case, y, variant) == 0
        return y

    def topk(self, variant: str, case: TopK) -> np.ndarray:
        return self.topk_into(variant, case, np.full_like(case.x, 77))

    def quantize(self, variant: str, case: Quantize) -> tuple[np.ndarray, np.ndarray]:
        handle = self.library.handle
        rows, width = case.x.shape
        q, gamma = np.full(case.x.shape, 77, np.int8), np.zeros(rows, np.float32)
        function = handle.qsk_quantize_rows
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64] + [ctypes.c_void_p] * 2
        pointer = self._pointer(variant)
        assert function(pointer, case.x.ctypes.data, rows, width, q.ctypes.data, gamma.ctypes.data) == 0
        return q, gamma

    def ternary_status(
        self,
        case: Ternary,
        y: np.ndarray | None = None,
        variant: str = "generic",
        k: int | None = None,
        scratch_bytes: int | None = None,
        pad_byte: int | None = None,
    ) -> int:
        (m, width), n = case.x.shape, len(case.weights)
        packed = ternary.pack(case.weights)
        if pad_byte is not None:
            packed[:, -(-n // 4) :] = pad_byte
        y = np.empty((m, n), case.x.dtype) if y is None else y
        pointers = (case.x.ctypes.data, packed.ctypes.data, case.scale, y.ctypes.data)
        args = _TernaryArgs(TYPES[case.x.dtype], *pointers, m, width if k is None else k, n)
        return self._call("qsk_ternary_matmul", variant, args, case.workers, scratch_bytes)

    def ternary(self, variant: str, case: Ternary, pad_byte: int | None = None) -> np.ndarray:
        y = np.full((len(case.x), len(case.weights)), 77, case.x.dtype)
        assert self.ternary_status(case, y, variant, pad_byte=pad_byte) == 0
        return y

    def sparse_status(
        self,
        case: Sparse,
        y: np.ndarray,
        variant: str = "generic",
        rescale: bool = False,
        scratch_bytes: int | None = None,
    ) -> int:
        packed, outputs = joined(case), np.array([len(weights) for weights in case.matrices], np.int64)
        scales = case.scales
        args = _SparseArgs(
            TYPES[case.x.dtype],
            case.x.ctypes.data,
            packed.ctypes.data,
            scales.ctypes.data,
            outputs.ctypes.data,
            len(outputs),
            y.ctypes.data,
            *case.x.shape,
            case.k,
            case.block,
            rescale,
        )
        return self._call("qsk_sparse_ternary_matmul", variant, args, case.workers, scratch_bytes)

    def sparse(self, variant: str, case: Sparse, rescale: bool = False) -> np.ndarray:
        y = np.full((len(case.x), sum(len(weights) for weights in case.matrices)), 77, case.x.dtype)
        assert self.sparse_status(case, y, variant, rescale) == 0
        return y

    def check(self, variant: str, case: Case) -> None:
        if isinstance(case, Sparse):
            case.check(self.sparse(variant, case))
        elif isinstance(case, TopK):
            case.check(self.topk(variant, case))
        elif isinstance(case, Quantize):
            case.check(*self.quantize(variant, case))
        else:
            case.check(self.ternary(variant, case))


def joined(case: Sparse) -> np.ndarray:
    """The packed matrices side by side."""
    packed = [ternary.pack(weights) for weights in case.matrices]
    return np.ascontiguousarray(np.concatenate(packed, axis=1)) if packed else np.zeros((case.x.shape[1], 0), np.uint8)


def tool(name: str, package: str) -> str:
    """A program from the environment of this Python or the path; fails with what to install."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.fail(f"{name} is missing, which this test needs: install {package}", pytrace=False)
    return found


def _write(case: Case) -> bytes:
    kind = TYPES[case.x.dtype]
    rows, width = case.x.shape
    if isinstance(case, TopK):
        numbers = (OPS["topk"], kind, rows, width, case.k, case.block, case.rescale, case.workers)
        return struct.pack("<8q", *numbers) + case.x.tobytes()
    if isinstance(case, Quantize):
        return struct.pack("<3q", OPS["quantize"], rows, width) + case.x.tobytes()
    if isinstance(case, Sparse):
        outputs = [len(weights) for weights in case.matrices]
        numbers = (OPS["sparse"], kind, rows, width, case.k, case.block, case.workers, len(outputs), *outputs)
        head = struct.pack(f"<{len(numbers)}q", *numbers) + case.scales.tobytes()
        return head + case.x.tobytes() + joined(case).tobytes()
    head = struct.pack("<6qf", OPS["ternary"], kind, rows, width, len(case.weights), case.workers, case.scale)
    return head + case.x.tobytes() + ternary.pack(case.weights).tobytes()


@dataclass(frozen=True)
class Runner:
    """qsk_runner of one build, with what must come before it on a command line."""

    program: Path
    prefix: tuple[str, ...] = ()

    def start(self, *arguments: str, variant: str = "") -> subprocess.CompletedProcess[str]:
        environment = dict(os.environ, QSPARSE_VARIANT=variant)
        command = [*self.prefix, str(self.program), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)

    def variants(self, variant: str = "") -> tuple[str, list[str]]:
        """The chosen variant and all supported ones."""
        done = self.start("--variants", variant=variant)
        assert done.returncode == 0, done.stderr
        chosen, supported = done.stdout.splitlines()
        return chosen.split()[1], supported.split()[1:]

    def check(self, variant: str, cases: list[Case], folder: Path) -> None:
        """Run the cases with a forced variant and compare every result with its reference."""
        inputs, results = folder / f"{variant}.cases", folder / f"{variant}.results"
        with inputs.open("wb") as file:
            file.writelines(_write(case) for case in cases)
        done = self.start(str(inputs), str(results), variant=variant)
        assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}{done.stderr}"
        content = results.read_bytes()
        offset = 0

        def take(shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
            nonlocal offset
            array = np.frombuffer(content, dtype, int(np.prod(shape)), offset).reshape(shape)
            offset += array.nbytes
            return array

        for case in cases:
            assert take((1,), np.int64)[0] == 0, case
            rows = len(case.x)
            if isinstance(case, TopK):
                case.check(take(case.x.shape, case.x.dtype))
            elif isinstance(case, Quantize):
                case.check(take(case.x.shape, np.int8), take((rows,), np.float32))
            elif isinstance(case, Sparse):
                case.check(take((rows, sum(len(weights) for weights in case.matrices)), case.x.dtype))
            else:
                case.check(take((rows, len(case.weights)), case.x.dtype))
        assert offset == len(content)


def build_runner(name: str, *options: str) -> Path:
    """Configure and build qsk_runner in build/tests/<name>; later calls only rebuild what changed."""
    folder = BUILDS / name
    folder.mkdir(parents=True, exist_ok=True)
    cmake = tool("cmake", "cmake (pip install cmake)")
    configure = [cmake, "-S", str(ROOT), "-B", str(folder), "-DQSK_BUILD_ORT=OFF", "-DQSK_BUILD_RUNNER=ON", *options]
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, [cmake, "--build", str(folder), "--parallel", "2"]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                pytest.fail(f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}", pytrace=False)
    return folder / "tests" / "kernels" / "qsk_runner"
