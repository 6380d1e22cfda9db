"""Tensors over NumPy's memory."""

import numpy as np
import pytest

from qsparse_export.runtimes.tvm.tensors import aligned_zeros, copied, is_aligned, over


@pytest.mark.parametrize("shape", [(), (0,), (1, 2, 0, 12), (1,), (5, 7)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.bool_, np.int64, np.uint8])
def test_a_copy_has_the_values_and_memory_of_its_own(shape, dtype):
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    tensor = copied(array)
    assert tensor.shape == shape and str(tensor.dtype) == array.dtype.name
    np.testing.assert_array_equal(tensor.numpy(), array)
    before = array.copy()
    array[...] = 1
    np.testing.assert_array_equal(tensor.numpy(), before)


def test_what_is_shared_is_seen_on_both_sides():
    array = aligned_zeros((3, 5), np.dtype(np.float32))
    assert is_aligned(array) and not is_aligned(array[0, 1:])
    tensor = over(array)
    array[1, 2] = 7
    assert tensor.numpy()[1, 2] == 7


def test_any_layout_is_copied_to_rows():
    array = np.arange(12).reshape(3, 4).T[::2]
    np.testing.assert_array_equal(copied(array).numpy(), array)
