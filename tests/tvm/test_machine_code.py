"""What no machine here can run: the machine code for AVX-512 VNNI multiplies with the instructions that it is written for."""

import pytest
import tvm
from evidence import COMPILED, Evidence

from qsparse_export.runtimes.tvm.kernels.dense_matmul_nbits import dense_matmul_nbits
from qsparse_export.runtimes.tvm.kernels.sparse_matmul_nbits import sparse_matmul_nbits
from qsparse_export.runtimes.tvm.kernels.sparse_ternary_matmul import sparse_ternary_matmul
from qsparse_export.runtimes.tvm.lanes import AVX2, AVX512_VNNI
from qsparse_export.runtimes.tvm.tiling import Tiling

SELECTION = {"k_in": 256, "n": (130,), "k": 100, "block": 0, "rescale": "none", "tiling": Tiling(2)}


def assembly(prim_func, processor):
    target = tvm.target.Target({"kind": "llvm", "mcpu": processor})
    return tvm.compile(tvm.IRModule({"kernel": prim_func}), target=target).mod.inspect_source("asm")


@pytest.mark.parametrize(
    ("prim_func", "op", "instruction"),
    [
        (sparse_ternary_matmul(AVX512_VNNI, **SELECTION), "SparseTernaryMatMul", "vpdpbusd"),
        (sparse_matmul_nbits(AVX512_VNNI, **SELECTION, bits=4, group=32), "SparseMatMulNBits", "vpdpwssd"),
        (
            dense_matmul_nbits(AVX512_VNNI, n=130, k_in=256, bits=4, group=32, tiling=Tiling(2)),
            "DenseMatMulNBits",
            "vpdpwssd",
        ),
    ],
)
def test_avx512_vnni(prim_func, op, instruction, evidence):
    """vpdpwssd is what LLVM makes of the product of pairs and the addition behind it."""
    assert instruction in assembly(prim_func, "cascadelake")
    evidence(Evidence(op, "TVM", AVX512_VNNI.name, COMPILED))


def test_avx2_has_no_such_instruction():
    assert "vpdpbusd" not in assembly(sparse_ternary_matmul(AVX2, **SELECTION), "haswell")
