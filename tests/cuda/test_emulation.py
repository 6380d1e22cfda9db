"""The emulation finds what it is there to find, and computes what CUDA defines."""

import ctypes

import numpy as np
import pytest
from emulated_kernels import EmulatedKernels

MISTAKES = {
    "some_wait": "thread 0 waits in __syncthreads for others that have ended",
    "lanes_differ": "__ballot_sync and __shfl_sync",
    "too_much_shared": "50176 bytes of shared memory",
    "empty_grid": "a grid without blocks",
    "wide_grid": "beyond CUDA's limits",
}


def run(emulated: EmulatedKernels, name: str, is_broken: bool, order: int = 0) -> np.ndarray:
    values = np.arange(256, dtype=np.int32)
    emulated.handle.emulated_set_order(order)
    getattr(emulated.handle, f"broken_{name}")(ctypes.c_void_p(values.ctypes.data), ctypes.c_bool(is_broken))
    return values


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_reported(emulated: EmulatedKernels, name: str) -> None:
    run(emulated, name, False)
    assert emulated.take_failure() == ""
    run(emulated, name, True)
    assert MISTAKES[name] in emulated.take_failure()
    run(emulated, name, False)
    assert emulated.take_failure() == "", "a failure that was taken is gone"


def test_a_missing_barrier_shows_in_some_order(emulated: EmulatedKernels) -> None:
    for order in (0, 1, 5):
        np.testing.assert_array_equal(run(emulated, "reverse", False, order), np.arange(256)[::-1])
    broken = [run(emulated, "reverse", True, order) for order in (0, 1, 5)]
    assert all((values != np.arange(256)[::-1]).any() for values in broken)
    assert emulated.take_failure() == ""
