"""The GPU kernels between the products, executed on software devices, against the truth of the C++ kernels' cases."""

from collections.abc import Callable

import numpy as np
import pytest
from evidence import EMULATED, EXECUTED, Evidence, Record
from gpu_cases import Case, op_of
from layer_cases import is_float16, layer_cases
from software_device import SoftwareDevice

from qsparse_export.errors import UsageError
from qsparse_export.formats import nbits
from qsparse_export.runtimes.tvm.gpu.cached_attention import KEYS, MANY_SLICES, cached_attention
from qsparse_export.runtimes.tvm.gpu.gated_activation import gated_activation
from qsparse_export.runtimes.tvm.gpu.gather_nbits import gather_nbits
from qsparse_export.runtimes.tvm.gpu.program import Program
from qsparse_export.runtimes.tvm.gpu.words import as_words

CASES = list(layer_cases(11))


@pytest.mark.parametrize("case", [case for case in CASES if not is_float16(case)], ids=lambda case: case.label)
def test_on_pocl(pocl: SoftwareDevice, case: Case, evidence: Record) -> None:
    share = case.check(pocl.run(case.program, case.inputs))
    evidence(Evidence(op_of(case), "TVM GPU", "OpenCL", EXECUTED, "PoCL, on the CPU", share))


WITH_FLOAT16 = {op_of(case) for case in CASES if is_float16(case)}
EMULATED_CASES = [case for case in CASES if is_float16(case) or op_of(case) not in WITH_FLOAT16]


@pytest.mark.parametrize("case", EMULATED_CASES, ids=lambda case: case.label)
def test_emulated_cuda(emulated_cuda: SoftwareDevice, case: Case, evidence: Record) -> None:
    """Of an op that has cases in float16 those: in float32 it is in the whole models of test_whole_models.py."""
    share = case.check(emulated_cuda.run(case.program, case.inputs))
    evidence(Evidence(op_of(case), "TVM GPU", "CUDA source", EMULATED, "blocks and threads on the CPU", share))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gated_activation(n=8, activation="gelu"), "no activation 'gelu'"),
        (lambda: gather_nbits(n=4, k=8, bits=3, group=32), "3 bits in groups of 32"),
        (lambda: cached_attention(heads=3, kv_heads=2, width=8), "3 heads on 2"),
        (lambda: cached_attention(heads=2, kv_heads=2, width=7), "7 wide"),
    ],
)
def test_refusals(call: Callable[[], Program], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()


def test_an_id_that_is_none_gives_nan(pocl: SoftwareDevice) -> None:
    rng = np.random.default_rng(3)
    codes = rng.integers(-8, 8, (20, 33)).astype(np.int8)
    scales = rng.random((20, 2)).astype(np.float16)
    inputs = {
        "ids": np.array([0, -1, 19, 20, 2**40], np.int64),
        "w": as_words(nbits.pack_outputs(codes, 4)),
        "scales": scales.view(np.uint16),
    }
    y = pocl.run(gather_nbits(n=20, k=33, bits=4, group=32), inputs)["y"]
    assert np.isnan(y[[1, 3, 4]]).all()
    assert np.isfinite(y[[0, 2]]).all()


def test_a_query_that_sees_nothing_is_nan_and_a_hidden_nan_is_not_seen(pocl: SoftwareDevice) -> None:
    heads, kv_heads, width, total = 2, 1, 4, 3 * KEYS
    rng = np.random.default_rng(5)
    visible = np.zeros((3, 1, 1, total), bool)
    visible[1:, ..., KEYS + 1] = True
    key, value = rng.standard_normal((2, 3, kv_heads, total, width)).astype(np.float32)
    key[1, :, 5] = np.nan
    key[2, :, KEYS + 1] = np.nan
    inputs = {
        "qkv": rng.standard_normal((3, (heads + 2 * kv_heads) * width)).astype(np.float32),
        "cos": np.ones((3, 1, width // 2), np.float32),
        "sin": np.zeros((3, 1, width // 2), np.float32),
        "visible": visible,
        "key": key,
        "value": value,
    }
    for slices in (1, 2, MANY_SLICES):
        y = pocl.run(cached_attention(heads=heads, kv_heads=kv_heads, width=width, slices=slices), inputs)["y"]
        assert np.isnan(y[[0, 2]]).all()
        np.testing.assert_allclose(y[1], np.tile(value[1, 0, KEYS + 1], heads), rtol=1e-6)
