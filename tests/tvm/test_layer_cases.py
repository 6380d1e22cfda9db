"""The kernels between the products on this machine's instruction sets, with the cases of the C++ kernels."""

import add_rms_norm_cases
import gated_activation_cases
import gather_cases
import numpy as np
import pytest
import topk_cases
import tvm
from evidence import EXECUTED, Evidence
from prim_func_calls import LANES, compiled

from qsparse_export.formats import nbits
from qsparse_export.runtimes.tvm.kernels.gated_activation import gated_activation
from qsparse_export.runtimes.tvm.kernels.gather_nbits import gather_nbits
from qsparse_export.runtimes.tvm.kernels.rms_norm import add_rms_norm
from qsparse_export.runtimes.tvm.kernels.topk_sparsify import topk_sparsify

EVERY = 12
"""Of the cases: each width is compiled anew."""


def topk_call(case):
    static = {"k_in": case.x.shape[1], "k": case.k, "block": case.block, "rescale": "none"}
    return topk_sparsify, static, (case.x,), (case.x.shape,)


def gather_call(case):
    (n, k), weights = case.codes.shape, nbits.pack_outputs(case.codes, case.bits)
    static = {"n": n, "k": k, "bits": case.bits, "group": case.group}
    return gather_nbits, static, (case.x, weights, case.scales), ((len(case.x), k),)


def gated_call(case):
    rows, width = len(case.x), case.x.shape[1] // 2
    return gated_activation, {"n": width, "activation": case.activation}, (case.x,), ((rows, width),)


def norm_call(case):
    static = {"n": case.x.shape[1], "epsilon": case.epsilon}
    return add_rms_norm, static, (case.x, case.residual, case.weight), (case.x.shape, case.x.shape)


OPS = {
    "TopKSparsify": (topk_cases, topk_call),
    "GatherNBits": (gather_cases, gather_call),
    "GatedActivation": (gated_activation_cases, gated_call),
    "AddRmsNorm": (add_rms_norm_cases, norm_call),
}


@pytest.mark.parametrize("lanes", LANES, ids=[lanes.name for lanes in LANES])
@pytest.mark.parametrize("op", OPS)
def test_cases_of_the_kernels(lanes, op, evidence):
    module, call_of = OPS[op]
    found = [case for case in module.cases(np.random.default_rng(7)) if case.x.dtype != np.float16 and case.x.shape[-1]]
    found = [case for case in found if not getattr(case, "rescale", False)][::EVERY]
    assert len(found) >= 4
    share = 0.0
    for case in found:
        function, static, inputs, shapes = call_of(case)
        outputs = [tvm.runtime.tensor(np.full(shape, np.nan, np.float32)) for shape in shapes]
        given = [tvm.runtime.tensor(np.ascontiguousarray(array)) for array in inputs]
        compiled(function, lanes, **static)(*given, *outputs)
        share = max(share, case.check(*(y.numpy() for y in outputs)))
    evidence(Evidence(op, "TVM", lanes.name, EXECUTED, error_share=share))
