"""Weights over the mapped file, and in memory of their own."""

from pathlib import Path

import numpy as np
import pytest

from qsparse_export.errors import BundleError
from qsparse_export.runtimes.tvm.weights import Weight, mapped, resident

# Of any type, at any offset, empty too.
WEIGHTS = (
    Weight("codes", "uint8", (300, 129), 0),
    Weight("scales", "float16", (7, 64), 64 * 700),
    Weight("askew", "float32", (5,), 64 * 720 + 4),
    Weight("none", "float32", (0, 4), 64 * 730),
)
BYTES = 64 * 800


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.onnx.data"
    path.write_bytes(np.random.default_rng(2).integers(0, 60, BYTES, np.uint8).tobytes())
    return path


def is_mapped(file: Path) -> bool:
    return str(file) in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize(("word", "stays_on_disk"), [("1", False), ("0", True)])
def test_the_same_values_with_and_without_the_file(file, monkeypatch, word, stays_on_disk):
    monkeypatch.setenv("QSPARSE_HUGE_PAGES", word)
    content = np.fromfile(file, np.uint8)
    tensors = resident(WEIGHTS, file)
    assert is_mapped(file) is stays_on_disk
    for weight, tensor, other in zip(WEIGHTS, tensors, mapped(WEIGHTS, file), strict=True):
        expected = content[weight.offset_bytes :][: weight.size_bytes].view(weight.dtype).reshape(weight.shape)
        np.testing.assert_array_equal(tensor.numpy(), expected)
        np.testing.assert_array_equal(other.numpy(), expected)


@pytest.mark.parametrize("load", [mapped, resident])
def test_a_file_that_is_too_short_is_refused(file, load):
    with file.open("r+b") as content:
        content.truncate(64 * 716)
    with pytest.raises(BundleError, match=f"has {64 * 716} bytes, and askew ends at {64 * 720 + 24}"):
        load(WEIGHTS, file)


def test_no_weights_need_no_file(tmp_path):
    assert resident((), tmp_path / "missing") == mapped((), tmp_path / "missing") == []
