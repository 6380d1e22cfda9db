"""The GPU kernels between the products, executed on software devices, against the truth of the C++ kernels' cases."""

from collections.abc import Callable

import numpy as np
import pytest
from evidence import EMULATED, EXECUTED, Evidence, Record
from gpu_cases import Case, op_of
from layer_cases import dtypes_of, is_float16, layer_cases
from software_device import SoftwareDevice
from webgpu_limits import require_limits

from qsparse_export.errors import UsageError
from qsparse_export.formats import nbits
from qsparse_export.runtimes.tvm.gpu.cached_attention import KEYS, MANY_SLICES, cached_attention
from qsparse_export.runtimes.tvm.gpu.gated_activation import gated_activation
from qsparse_export.runtimes.tvm.gpu.gather_nbits import gather_nbits
from qsparse_export.runtimes.tvm.gpu.program import Program
from qsparse_export.runtimes.tvm.gpu.words import as_words

CASES = list(layer_cases(11))
WEB_CASES = list(layer_cases(11, web=True))
IDS = [("pocl", "int64"), ("lavapipe", "int32"), pytest.param("swiftshader", "int32", marks=pytest.mark.web)]
MASKS = [("pocl", "bool"), *IDS[1:]]


@pytest.mark.parametrize("case", [case for case in CASES if not is_float16(case)], ids=lambda case: case.label)
def test_on_pocl(pocl: SoftwareDevice, case: Case, evidence: Record) -> None:
    share = case.check(pocl.run(case.program, case.inputs))
    evidence(Evidence(op_of(case), "TVM GPU", "OpenCL", EXECUTED, "PoCL, on the CPU", share))


@pytest.mark.parametrize("case", WEB_CASES, ids=lambda case: case.label)
def test_on_lavapipe(lavapipe: SoftwareDevice, case: Case, evidence: Record) -> None:
    share = case.check(lavapipe.run(case.program, case.inputs))
    backend = "WebGPU float16" if is_float16(case) else "WebGPU"
    evidence(Evidence(op_of(case), "TVM GPU", backend, EXECUTED, "Mesa lavapipe, on the CPU", share))


@pytest.mark.web
@pytest.mark.parametrize("case", [case for case in WEB_CASES if not is_float16(case)], ids=lambda case: case.label)
def test_in_a_browser(swiftshader: SoftwareDevice, case: Case, evidence: Record) -> None:
    share = case.check(swiftshader.run(case.program, case.inputs))
    evidence(Evidence(op_of(case), "TVM GPU", "WebGPU", EXECUTED, "Chromium's SwiftShader", share))


def test_webgpu_has_every_op_and_each_float_type_that_opencl_and_cuda_have() -> None:
    kinds = [{(op_of(case), is_float16(case)) for case in cases} for cases in (CASES, WEB_CASES)]
    assert kinds[0] == kinds[1]
    assert set().union(*map(dtypes_of, WEB_CASES)) == {"float16", "float32", "int32", "uint32"}


def test_no_kernel_exceeds_what_every_webgpu_device_has() -> None:
    for case in WEB_CASES:
        require_limits(case.program)


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


@pytest.mark.parametrize(("device", "ids_dtype"), IDS, indirect=["device"])
def test_an_id_that_is_none_gives_nan(device: SoftwareDevice, ids_dtype: str) -> None:
    rng = np.random.default_rng(3)
    codes = rng.integers(-8, 8, (20, 64)).astype(np.int8)
    scales = rng.random((20, 2)).astype(np.float16)
    inputs = {
        "ids": np.array([0, -1, 19, 20, 2**40 if ids_dtype == "int64" else 2**30], ids_dtype),
        "w": as_words(nbits.pack_outputs(codes, 4)),
        "scales": as_words(scales.view(np.uint16)),
    }
    y = device.run(gather_nbits(n=20, k=64, bits=4, group=32, ids_dtype=ids_dtype), inputs)["y"]
    assert np.isnan(y[[1, 3, 4]]).all()
    assert np.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize(("device", "mask_dtype"), MASKS, indirect=["device"])
def test_a_query_that_sees_nothing_is_nan_and_a_hidden_nan_is_not_seen(device: SoftwareDevice, mask_dtype: str) -> None:
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
        "visible": visible.astype(mask_dtype),
        "key": key,
        "value": value,
    }
    for slices in (1, 2, MANY_SLICES):
        static = {"heads": heads, "kv_heads": kv_heads, "width": width, "slices": slices}
        y = device.run(cached_attention(**static, mask_dtype=mask_dtype), inputs)["y"]
        assert np.isnan(y[[0, 2]]).all()
        np.testing.assert_allclose(y[1], np.tile(value[1, 0, KEYS + 1], heads), rtol=1e-6)
