"""The kernels between the products as machine code for ARM, run under qemu without any TVM library."""

import numpy as np
import pytest
from emulated_host import HostCall, build_host, build_library, results, run
from evidence import EMULATED, STANDARD_HEAD, STANDARD_NORM, Evidence, share_within
from test_cached_attention import operands
from test_layer_kernels import rows_with_ties

from qsparse_export.formats import nbits
from qsparse_export.ops import (
    add_rms_norm,
    cached_attention,
    gated_activation,
    gather_nbits,
    sparse_matmul,
    topk_sparsify,
)
from qsparse_export.runtimes.tvm.kernels import cached_attention as attention_kernel
from qsparse_export.runtimes.tvm.kernels import dense_matmul as dense_kernel
from qsparse_export.runtimes.tvm.kernels import gated_activation as activation_kernel
from qsparse_export.runtimes.tvm.kernels import gather_nbits as gather_kernel
from qsparse_export.runtimes.tvm.kernels import rms_norm as norm_kernel
from qsparse_export.runtimes.tvm.kernels import sparse_matmul as product_kernel
from qsparse_export.runtimes.tvm.kernels import topk_sparsify as topk_kernel
from qsparse_export.runtimes.tvm.lanes import NEON, NEON_DOT


def cases(lanes):
    """Ops, calls, and what each must give within which relative and absolute error."""
    rng = np.random.default_rng(0)
    for n in (1, 5, 37):
        x, weight = rng.standard_normal((3, n)).astype(np.float32), rng.standard_normal(n).astype(np.float32)
        expected = add_rms_norm.reference(x, np.zeros_like(x), weight, 1e-5)[1]
        yield (
            STANDARD_NORM,
            HostCall(norm_kernel.rms_norm(lanes, n=n, epsilon=1e-5), (x, weight), x.shape),
            expected,
            1e-5,
            0,
        )
        residual, total = rng.standard_normal((3, n)).astype(np.float32), np.zeros_like(x)
        expected = add_rms_norm.reference(x, residual, weight, 1e-5)[1]
        # The first of its two results is written into what looks like an input here.
        call = HostCall(norm_kernel.add_rms_norm(lanes, n=n, epsilon=1e-5), (x, residual, weight, total), x.shape)
        yield "AddRmsNorm", call, expected, 1e-5, 0
        for activation in ("relu2", "silu"):
            gates = np.resize([-np.inf, np.nan, -88, -1, 0, 1, 90, np.inf, *rng.standard_normal(50)], (2, 2 * n))
            gates = gates.astype(np.float32)
            kernel = activation_kernel.gated_activation(lanes, n=n, activation=activation)
            call = HostCall(kernel, (gates,), (2, n))
            yield "GatedActivation", call, gated_activation.reference(gates, activation), 1e-6, 1e-40
    for bits in (4, 8):
        codes = rng.integers(-(1 << bits - 1), 1 << bits - 1, (20, 33)).astype(np.int8)
        operands_ = (np.array([0, 19, 3]), nbits.pack_outputs(codes, bits), rng.random((20, 3)).astype(np.float16))
        kernel = gather_kernel.gather_nbits(lanes, n=20, k=33, bits=bits, group=16)
        call = HostCall(kernel, operands_, (3, 33))
        yield "GatherNBits", call, gather_nbits.reference(*operands_, 33, bits, 16), 0, 0
    for k_in, k, block in ((37, 10, 0), (37, 4, 8), (64, 0, 0)):
        x = rows_with_ties(rng, k_in)
        kernel = topk_kernel.topk_sparsify(lanes, k_in=k_in, k=k, block=block, rescale="none")
        yield "TopKSparsify", HostCall(kernel, (x,), x.shape), topk_sparsify.reference(x, k, block, "none"), 0, 0
        x, w = x[[0, 1, 4]], rng.standard_normal((k_in, 300)).astype(np.float32)
        kernel = product_kernel.sparse_matmul(lanes, k_in=k_in, n=(300,), k=k, block=block, rescale="none")
        call = HostCall(kernel, (x, w), (3, 300))
        yield "SparseMatMul", call, sparse_matmul.reference(x, w, k, block, "none", (300,)), 0, 1e-4
        w = np.ascontiguousarray(w.T)
        kernel = dense_kernel.dense_matmul(lanes, k_in=k_in, n=300)
        yield STANDARD_HEAD, HostCall(kernel, (x, w), (3, 300)), x @ w.T, 0, 1e-4
    for heads, kv_heads, width in ((9, 3, 64), (4, 2, 6)):
        for batch, tokens, past in ((1, 1, 70), (2, 3, 40)):
            arrays = operands(rng, heads, kv_heads, width, batch, tokens, past, 2)
            y = cached_attention.reference(*arrays, heads, kv_heads)[0].reshape(batch * tokens, -1)
            qkv = arrays[0].reshape(batch * tokens, -1)
            kernel = attention_kernel.cached_attention(lanes, heads=heads, kv_heads=kv_heads, width=width)
            yield "CachedAttention", HostCall(kernel, (qkv, *arrays[1:]), y.shape), y, 1e-4, 1e-5


@pytest.mark.parametrize(
    ("lanes", "features", "cpu"), [(NEON, ["neon"], "cortex-a53"), (NEON_DOT, ["neon", "dotprod"], "cortex-a76")]
)
def test_against_the_references(lanes, features, cpu, tmp_path, evidence):
    ops, calls, expected, rtol, atol = zip(*cases(lanes), strict=True)
    done = run(build_host(tmp_path), build_library(calls, features, tmp_path), calls, cpu, tmp_path)
    assert done.returncode == 0, done.stderr
    made = results(calls, tmp_path)
    for op, call, y, wanted, relative, absolute in zip(ops, calls, made, expected, rtol, atol, strict=True):
        share = share_within(y, wanted, relative, absolute, call.prim_func.attrs["global_symbol"])
        evidence(Evidence(op, "TVM", lanes.name, EMULATED, f"qemu {cpu}", share))
