"""The products' PrimFuncs as machine code for ARM, run under qemu without any TVM library."""

import signal

import pytest
from emulated_host import HostCall, build_host, build_library, results, run
from evidence import EMULATED, Evidence
from product_cases import dense_ternary_cases, head_cases, kernel_of, nbits_cases, op_names, tensors_of, ternary_cases

from qsparse_export.runtimes.tvm.lanes import NEON, NEON_DOT

EVERY = 11
"""Of the cases: an emulated processor takes its time."""


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return build_host(tmp_path_factory.mktemp("host"))


def host_calls(cases, lanes):
    calls = []
    for case in cases:
        function, static = kernel_of(case)
        inputs, shape = tensors_of(case)
        calls.append(HostCall(function(lanes, **static), inputs, shape))
    return calls


@pytest.mark.parametrize("cases", [ternary_cases, dense_ternary_cases, nbits_cases, head_cases])
@pytest.mark.parametrize(
    ("lanes", "features", "cpu"), [(NEON, ["neon"], "cortex-a53"), (NEON_DOT, ["neon", "dotprod"], "cortex-a76")]
)
def test_cases_of_the_kernels(host, lanes, features, cpu, cases, tmp_path, evidence):
    found = [case for case in cases() if case.x.size < 20_000][::EVERY]
    assert len(found) >= 5
    calls = host_calls(found, lanes)
    done = run(host, build_library(calls, features, tmp_path), calls, cpu, tmp_path)
    assert done.returncode == 0, done.stderr
    share = max(case.check(y) for case, y in zip(found, results(calls, tmp_path), strict=True))
    evidence(Evidence(op_names(found), "TVM", lanes.name, EMULATED, f"qemu {cpu}", share))


def test_a_processor_without_the_dot_product_refuses_it(host, tmp_path):
    """So the one that passes does use it."""
    cases = [case for case in ternary_cases() if case.x.any() and case.k and sum(map(len, case.matrices))][:1]
    calls = host_calls(cases, NEON_DOT)
    library = build_library(calls, ["neon", "dotprod"], tmp_path)
    assert run(host, library, calls, "cortex-a53", tmp_path).returncode in (-signal.SIGILL, 128 + signal.SIGILL)
    assert run(host, library, calls, "cortex-a76", tmp_path).returncode == 0


def test_a_tensor_of_another_type_is_refused(host, tmp_path):
    calls = host_calls(ternary_cases()[:1], NEON)
    library = build_library(calls, ["neon"], tmp_path)
    wrong = [HostCall(calls[0].prim_func, (calls[0].inputs[0].astype("float64"), *calls[0].inputs[1:]), calls[0].shape)]
    done = run(host, library, wrong, "cortex-a53", tmp_path)
    assert done.returncode == 1
    assert "float32" in done.stderr
