"""NAME: calls CUDA as no program may, on the stand-in, and prints what the stand-in says; with ``nothing``, as one may."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path

RUNTIME, DRIVER = ctypes.CDLL("libcudart.so.13"), ctypes.CDLL("libcuda.so.1")
BYTES = 400
"""Of each allocation: it is followed by 48 bytes of nothing, and then by what cannot be touched."""
TO_DEVICE = 1
Value = ctypes.c_void_p | ctypes.c_int64


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint),
    )


def image() -> bytes:
    return next(Path(os.environ["STAND_IN_KERNELS"]).glob("*/image")).read_bytes()


def allocated() -> ctypes.c_void_p:
    pointer = ctypes.c_void_p()
    assert RUNTIME.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(BYTES)) == 0
    return pointer


def moved(pointer: ctypes.c_void_p, offset_bytes: int) -> ctypes.c_void_p:
    assert pointer.value
    return ctypes.c_void_p(pointer.value + offset_bytes)


def launch(
    name: str, *values: Value, blocks: int = 1, threads: int = 64, shared_bytes: int = 0, stream: int | None = None
) -> int:
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    assert DRIVER.cuModuleLoadData(ctypes.byref(module), image()) == 0
    assert DRIVER.cuModuleGetFunction(ctypes.byref(function), module, name.encode()) == 0
    three = ctypes.c_uint * 3
    config = LaunchConfig(three(blocks, 1, 1), three(threads, 1, 1), shared_bytes, stream, None, 0)
    addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    return DRIVER.cuLaunchKernelEx(ctypes.byref(config), function, addresses, None)


def store(pointer: ctypes.c_void_p, index: int) -> int:
    return launch("store_kernel", pointer, ctypes.c_int64(index))


def nothing() -> int:
    pointer = allocated()
    status = store(pointer, BYTES // 4 - 1)
    status |= launch("copy_kernel", pointer, allocated(), threads=100)
    status |= launch("dynamic_kernel", pointer, shared_bytes=48 << 10)
    status |= store(moved(pointer, 4), 0) | launch("some_wait_kernel", pointer, threads=32)
    return status | RUNTIME.cudaFree(pointer)


def freed_argument() -> int:
    pointer = allocated()
    RUNTIME.cudaFree(pointer)
    return store(pointer, 0)


def freed_twice() -> int:
    pointer = allocated()
    RUNTIME.cudaFree(pointer)
    return RUNTIME.cudaFree(pointer)


def kept_address() -> int:
    """Of freed memory, in a kernel that got another pointer."""
    pointer, other = allocated(), allocated()
    RUNTIME.cudaFree(pointer)
    assert pointer.value and other.value
    return store(other, (pointer.value - other.value) // 4)


def beyond_a_copy() -> int:
    return RUNTIME.cudaMemcpyAsync(allocated(), bytes(404), ctypes.c_size_t(404), TO_DEVICE, None)


def memory_in_a_capture() -> int:
    stream, pointer = ctypes.c_void_p(), ctypes.c_void_p()
    RUNTIME.cudaStreamCreate(ctypes.byref(stream))
    RUNTIME.cudaStreamBeginCapture(stream, 0)
    return RUNTIME.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(BYTES))


def default_stream_in_a_capture() -> int:
    stream, pointer = ctypes.c_void_p(), allocated()
    RUNTIME.cudaStreamCreate(ctypes.byref(stream))
    RUNTIME.cudaStreamBeginCapture(stream, 0)
    return launch("store_kernel", pointer, ctypes.c_int64(0), stream=stream.value) or store(pointer, 0)


def unknown_image() -> int:
    return DRIVER.cuModuleLoadData(ctypes.byref(ctypes.c_void_p()), image()[:-1] + b"?")


MISUSES: dict[str, Callable[[], int]] = {
    "nothing": nothing,
    "freed argument": freed_argument,
    "freed twice": freed_twice,
    "kept address": kept_address,
    "host memory": lambda: store(ctypes.c_void_p(ctypes.addressof(ctypes.c_float())), 0),
    "null": lambda: store(ctypes.c_void_p(None), 0),
    "misaligned": lambda: store(moved(allocated(), 2), 0),
    "just behind": lambda: store(allocated(), BYTES // 4),
    "far behind": lambda: store(allocated(), BYTES // 4 + 12),
    "in front": lambda: store(allocated(), -1),
    "read behind": lambda: launch("copy_kernel", allocated(), allocated(), threads=128),
    "large block": lambda: launch("copy_kernel", allocated(), allocated(), threads=1025),
    "larger block than compiled for": lambda: launch("some_wait_kernel", allocated(), threads=65),
    "empty grid": lambda: launch("some_wait_kernel", allocated(), blocks=0, threads=32),
    "missed barrier": lambda: launch("some_wait_kernel", allocated()),
    "shared memory": lambda: launch("large_kernel", allocated()),
    "dynamic shared memory": lambda: launch("dynamic_kernel", allocated(), shared_bytes=49153),
    "beyond a copy": beyond_a_copy,
    "memory in a capture": memory_in_a_capture,
    "default stream in a capture": default_stream_in_a_capture,
    "unknown image": unknown_image,
}


if __name__ == "__main__":
    status = MISUSES[sys.argv[1]]()
    RUNTIME.stand_in_problem.restype = ctypes.c_char_p
    problem = RUNTIME.stand_in_problem().decode()
    assert (status != 0) == bool(problem), (status, problem)
    print(problem)
