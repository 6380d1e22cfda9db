"""Every CUDA kernel, emulated, against the references of the CPU kernels: bit for bit, but for sums of floats."""

import ctypes

import numpy as np
import pytest
from compiled_kernels import kernels_in_sources
from cuda_cases import KERNELS, NAMES, OPS
from emulated_kernels import EmulatedKernels
from evidence import EMULATED, Evidence, Record
from quantize_cases import Quantize
from sparse_matmul_cases import SparseMatMul, integer_weights
from sparse_ternary_cases import SparseTernary
from ternary_cases import ternary_weights
from topk_cases import TopK

MULTIPROCESSORS = (1, 8, 132)
"""One slice, a few, and as many as there is work for."""
ORDERS = (0, 1, 2, 3)


@pytest.mark.parametrize("op", OPS)
def test_cases(emulated: EmulatedKernels, op: str, evidence: Record) -> None:
    cases, least = OPS[op]
    count, share = 0, 0.0
    emulated.take_launched()
    for count, case in enumerate(cases(np.random.default_rng(1)), 1):
        share = max(share, emulated.check(case, MULTIPROCESSORS[count % 3], ORDERS[count // 3 % 4]))
    assert count >= least
    written = {name for name in emulated.instances.values() if {name, name.partition("<")[0]} & KERNELS[op]}
    assert emulated.take_launched() == written
    evidence(Evidence(NAMES[op], "CUDA", "any", EMULATED, "blocks and threads on the CPU", share))


def test_the_cases_launch_every_kernel(emulated: EmulatedKernels) -> None:
    """Of every type: test_cases asserts that what KERNELS names is launched."""
    names = [name.partition("<")[0] for name in emulated.instances.values()]
    wanted = {name for name in set().union(*KERNELS.values()) if "<" not in name}
    assert set(names) == kernels_in_sources() == wanted
    assert KERNELS.keys() == OPS.keys() and len(names) > len(set(names)), "an instance for each type"


@pytest.mark.parametrize(("rows", "dtype"), [(2, np.float32), (33, np.float32), (9, np.float16)])
@pytest.mark.parametrize("multiprocessors", MULTIPROCESSORS)
def test_float_sums_have_one_order(
    emulated: EmulatedKernels, multiprocessors: int, rows: int, dtype: type[np.floating]
) -> None:
    rng = np.random.default_rng(4)
    x = rng.standard_normal((rows, 1500)).astype(dtype)
    case = SparseMatMul(x, integer_weights(rng, (130,), 1500, 4, 32), 600, fixed_point=False)
    results = set()
    for order in ORDERS:
        call = case.call()
        assert emulated.status(call, multiprocessors, order) == 0
        results.add(call.outputs["y"].tobytes())
    assert len(results) == 1


def some_calls() -> list[TopK | Quantize | SparseTernary | SparseMatMul]:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((2, 64)).astype(np.float32)
    return [
        TopK(x, 20),
        Quantize(x),
        SparseTernary(x, (ternary_weights(rng, 130, 64, "normal"),), 20),
        SparseMatMul(x, integer_weights(rng, (65,), 64, 4, 32), 20),
    ]


def test_bad_arguments_are_refused(emulated: EmulatedKernels) -> None:
    null_argument, bad_size, bad_type, bad_k, scratch_too_small, misaligned = 1, 2, 3, 4, 5, 101
    topk, quantize, ternary, nbits = some_calls()
    for case, field, value, expected in (
        (topk, "type", 3, bad_type),
        (topk, "k", 65, bad_k),
        (topk, "block", -1, bad_size),
        (quantize, "rows", -1, bad_size),
        (ternary, "type", 0, bad_type),
        (ternary, "top_k", 65, bad_k),
        (ternary, "k", 9_000_000, bad_size),
        (ternary, "m", 1 << 40, bad_size),
        (ternary, "matrices", 65, bad_size),
        (nbits, "weight_type", 1, bad_type),
        (nbits, "group", 0, bad_size),
        (nbits, "top_k", -1, bad_k),
    ):
        call = case.call()
        setattr(call.args, field, value)
        assert emulated.status(call) == expected, (case, field, value)
    for case in (ternary, nbits):
        assert emulated.status(case.call(), scratch_bytes=64) == scratch_too_small
        call = case.call()
        call.inputs["w"] = np.concatenate([np.zeros((1, 1), np.uint8), call.inputs["w"].reshape(1, -1)], axis=1)[:, 1:]
        assert emulated.status(call) == 0, "a copy is aligned again"
        function = getattr(emulated.handle, call.function.replace("qsk_", "qsk_cuda_"))
        call.args.w += 1
        scratch = np.zeros(1 << 20, np.uint8)
        aligned = ctypes.c_void_p(scratch.ctypes.data + -scratch.ctypes.data % 64)
        queue = (ctypes.c_int64 * 2)(0, 4)
        assert function(ctypes.byref(call.args), queue, aligned, ctypes.c_int64(1 << 19)) == misaligned
        assert function(ctypes.byref(call.args), None, aligned, ctypes.c_int64(1 << 19)) == null_argument
