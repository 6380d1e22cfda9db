"""Every GPU kernel of TVM, executed on software devices, against the NumPy references: bit for bit, but for sums of floats."""

import dataclasses
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from device_kernels import device_kernels
from evidence import EMULATED, EXECUTED, Evidence, Record
from gpu_cases import Case, cases, every_kind, nbits_case, op_of, quantize_case, ternary_case, topk_case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from layer_cases import is_float16, layer_cases
from software_device import SoftwareDevice
from sparse_matmul_cases import integer_weights
from ternary_cases import ternary_weights
from webgpu_limits import require_limits

from qsparse_export.errors import UsageError
from qsparse_export.runtimes.tvm.gpu.packed_bytes import dp4a
from qsparse_export.runtimes.tvm.gpu.program import Program
from qsparse_export.runtimes.tvm.gpu.quantize_rows import quantize_rows
from qsparse_export.runtimes.tvm.gpu.sparse_matmul_nbits import sparse_matmul_nbits
from qsparse_export.runtimes.tvm.gpu.sparse_ternary_matmul import sparse_ternary_gemm, sparse_ternary_gemv
from qsparse_export.runtimes.tvm.gpu.topk_sparsify import topk_sparsify

ROOT = Path(__file__).parents[3]


def run(case: Case, device: SoftwareDevice) -> float:
    """The largest error, as a share of what is allowed."""
    return case.check(device.run(case.program, case.inputs))


def some(dtype: type, step: int) -> list[Case]:
    return list(cases(np.random.default_rng(1), dtype))[::step]


@pytest.mark.parametrize("case", some(np.float32, 4), ids=lambda case: case.label)
def test_on_pocl(pocl: SoftwareDevice, case: Case, evidence: Record) -> None:
    share = run(case, pocl)
    evidence(Evidence(op_of(case), "TVM GPU", "OpenCL", EXECUTED, "PoCL, on the CPU", share))


@pytest.mark.parametrize("case", some(np.float32, 8), ids=lambda case: case.label)
def test_on_lavapipe(lavapipe: SoftwareDevice, case: Case, evidence: Record) -> None:
    share = run(case, lavapipe)
    evidence(Evidence(op_of(case), "TVM GPU", "WebGPU", EXECUTED, "Mesa lavapipe, on the CPU", share))


@pytest.mark.web
@pytest.mark.parametrize("case", some(np.float32, 8), ids=lambda case: case.label)
def test_in_a_browser(swiftshader: SoftwareDevice, case: Case, evidence: Record) -> None:
    share = run(case, swiftshader)
    evidence(Evidence(op_of(case), "TVM GPU", "WebGPU", EXECUTED, "Chromium's SwiftShader", share))


@pytest.mark.parametrize("case", some(np.float16, 8), ids=lambda case: case.label)
def test_float16_on_lavapipe(lavapipe: SoftwareDevice, case: Case, evidence: Record) -> None:
    """PoCL has no float16 on a CPU."""
    share = run(case, lavapipe)
    evidence(Evidence(op_of(case), "TVM GPU", "WebGPU float16", EXECUTED, "Mesa lavapipe, on the CPU", share))


def test_the_cases_run_every_kernel() -> None:
    written = set()
    for path in (ROOT / "runtimes" / "tvm" / "gpu").glob("*.py"):
        written |= set(re.findall(r'\bkernel\("(\w+)"', path.read_text("utf-8")))
    assert len(written) >= 20
    between = {
        str(kernel.attrs["global_symbol"])
        for case in layer_cases(11)
        if not is_float16(case)
        for kernel in case.program.kernels
    }
    for chosen in (some(np.float32, 4), some(np.float32, 8), some(np.float16, 8)):
        names = {str(kernel.attrs["global_symbol"]) for case in chosen for kernel in case.program.kernels}
        assert names | between == written


@pytest.mark.parametrize("case", some(np.float32, 10) + some(np.float16, 12), ids=lambda case: case.label)
def test_emulated_cuda(emulated_cuda: SoftwareDevice, case: Case, evidence: Record) -> None:
    """The source that nvcc compiles."""
    share = run(case, emulated_cuda)
    evidence(Evidence(op_of(case), "TVM GPU", "CUDA source", EMULATED, "blocks and threads on the CPU", share))


@pytest.mark.parametrize("make", [sparse_ternary_gemv, sparse_ternary_gemm])
def test_dp4a(emulated_cuda: SoftwareDevice, make: Callable[..., Program]) -> None:
    """What NVIDIA GPUs have for four products at once."""
    rng = np.random.default_rng(2)
    matrices = [ternary_weights(rng, n, 130, "normal") for n in (130, 5)]
    case = ternary_case(every_kind(rng, 130), matrices, 50, make=make, dot=dp4a)
    assert any("__dp4a(" in kernel.source for kernel in device_kernels(case.program, "cuda"))
    run(case, emulated_cuda)


@pytest.mark.parametrize("device", ["pocl", "lavapipe"], indirect=True)
def test_float_sums_have_one_order(device: SoftwareDevice) -> None:
    rng = np.random.default_rng(4)
    x = rng.standard_normal((3, 1500)).astype(np.float32)
    case = nbits_case(x, integer_weights(rng, (130,), 1500, 4, 32), 600, slices=3)
    made = [device.run(case.program, case.inputs) for _ in range(3)]
    assert all(case.check(tensors) <= 1 for tensors in made)
    assert len({tensors["y"].tobytes() for tensors in made}) == 1


def test_no_kernel_exceeds_what_every_webgpu_device_has() -> None:
    for case in some(np.float32, 4):
        require_limits(case.program)


FLOATS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 127.0, -127.0, float("nan"), float("inf"), -float("inf"), 1e-40, 3e38]),
    st.floats(width=32),
)
SOME = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def rows_of(width: int) -> st.SearchStrategy[np.ndarray]:
    return arrays(np.float32, (2, width), elements=FLOATS)


@cache
def programs() -> dict[str, Program]:
    """Of one size each, so that they are compiled once."""
    return {
        "ranked": topk_case(np.zeros((1, 40), np.float32), 5, 16).program,
        "radix": topk_case(np.zeros((1, 70), np.float32), 20).program,
        "ternary": ternary_case(np.zeros((1, 70), np.float32), weights(), 20).program,
    }


def weights() -> list[np.ndarray]:
    return [ternary_weights(np.random.default_rng(5), 130, 70, "normal")]


@SOME
@given(x=rows_of(40))
def test_any_rows_ranked(pocl: SoftwareDevice, x: np.ndarray) -> None:
    run(dataclasses.replace(topk_case(x, 5, 16), program=programs()["ranked"]), pocl)


@SOME
@given(x=rows_of(70))
def test_any_rows_by_radix(pocl: SoftwareDevice, x: np.ndarray) -> None:
    first = dataclasses.replace(topk_case(x, 20), program=programs()["radix"])
    tensors = pocl.run(first.program, first.inputs)
    first.check(tensors)
    again = pocl.run(first.program, topk_case(tensors["y"], 20).inputs)
    np.testing.assert_array_equal(again["y"], tensors["y"])


@SOME
@given(x=rows_of(70))
def test_any_rows_ternary(pocl: SoftwareDevice, x: np.ndarray) -> None:
    run(dataclasses.replace(ternary_case(x, weights(), 20), program=programs()["ternary"]), pocl)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: topk_sparsify(k_in=10, k=11), "k is 11; expected 0 to 10"),
        (lambda: topk_sparsify(k_in=10, k=1, rescale="l1"), "rescale is 'l1'"),
        (lambda: sparse_ternary_gemv(k_in=0, n=[1], k=0), "there are 0 inputs"),
        (lambda: sparse_ternary_gemv(k_in=8, n=[0, 0], k=8), r"\[0, 0\] outputs; expected at least one"),
        (lambda: sparse_ternary_gemm(k_in=8, n=[4, -1], k=8), "a matrix has -1 outputs"),
        (lambda: sparse_ternary_gemv(k_in=8, n=[4], k=8, slices=0), "0 slices"),
        (lambda: sparse_matmul_nbits(k_in=8, n=[4], bits=3, group=32, k=8), "3 bits in groups of 32"),
        (lambda: sparse_matmul_nbits(k_in=8, n=[4], bits=4, group=0, k=8), "4 bits in groups of 0"),
        (lambda: quantize_rows(k_in=8, dtype="bfloat16"), "bfloat16"),
        (lambda: topk_sparsify(k_in=3_000_000, k=8), "3000000 inputs"),
    ],
)
def test_refusals(call: Callable[[], Program], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call()


@pytest.mark.parametrize(
    "device", ["pocl", "lavapipe", "emulated_cuda", pytest.param("swiftshader", marks=pytest.mark.web)], indirect=True
)
def test_quotients_are_rounded_correctly(device: SoftwareDevice) -> None:
    """Those of many rows' gamma, over all exponents; SwiftShader's own divisions are not."""
    rng = np.random.default_rng(6)
    gamma = rng.uniform(1, 2, 4000) * 2.0 ** rng.integers(-16, 127, 4000)
    gamma[:300] = [
        *(127 * 2.0 ** np.arange(-20, 100)),
        *(np.nextafter(np.float32(2.0) ** np.arange(-10, 110), 0)),
        *range(1, 61),
    ]
    x = gamma.astype(np.float32)[:, None]
    case = quantize_case(np.concatenate([x, x / 127 * rng.integers(0, 127, x.shape) * 0.5], axis=1).astype(np.float32))
    run(case, device)
