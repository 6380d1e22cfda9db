"""What the GPU kernels between the products are checked with: cases of the C++ kernels, as programs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeVar

import add_rms_norm_cases
import cached_attention_cases
import dense_matmul_cases
import gated_activation_cases
import gather_cases
import numpy as np
import sparse_matmul_cases
from add_rms_norm_cases import AddRmsNorm
from cached_attention_cases import CachedAttention
from dense_matmul_cases import DenseMatMul
from evidence import largest_share
from gated_activation_cases import GatedActivation
from gather_cases import Gather
from gpu_cases import EPS, Case
from kernel_inputs import magnitudes
from sparse_matmul_cases import SparseMatMul, integer_weights

from qsparse_export.formats import nbits
from qsparse_export.runtimes.tvm.gpu.cached_attention import MANY_SLICES, cached_attention
from qsparse_export.runtimes.tvm.gpu.dense_matmul import MANY_ROWS, dense_matmul, dense_matmul_nbits
from qsparse_export.runtimes.tvm.gpu.gated_activation import gated_activation
from qsparse_export.runtimes.tvm.gpu.gather_nbits import gather_nbits
from qsparse_export.runtimes.tvm.gpu.nbits_gemm import ROWS, sparse_matmul_nbits_gemm
from qsparse_export.runtimes.tvm.gpu.rms_norm import add_rms_norm, rms_norm
from qsparse_export.runtimes.tvm.gpu.sparse_matmul import sparse_matmul
from qsparse_export.runtimes.tvm.gpu.words import as_words

Kind = TypeVar("Kind")
MOST_VALUES = 30_000
"""Of a case: a block of 256 emulated threads takes its time."""


def norm_case(case: AddRmsNorm) -> Case:
    program = add_rms_norm(n=case.x.shape[1], epsilon=case.epsilon, dtype=case.x.dtype.name)
    inputs = {"x": case.x, "residual": case.residual, "weight": case.weight}
    return Case(f"AddRmsNorm {_kind(case.x)}", program, inputs, lambda made: case.check(made["total"], made["y"]))


def plain_norm_case(case: AddRmsNorm) -> Case:
    """The same without a residual."""
    program = rms_norm(n=case.x.shape[1], epsilon=case.epsilon, dtype=case.x.dtype.name)
    alone = AddRmsNorm(case.x, np.zeros_like(case.x), case.weight, case.epsilon)
    total = case.x + alone.residual  # -0 becomes 0
    inputs = {"x": case.x, "weight": case.weight}
    return Case(f"RMSNormalization {_kind(case.x)}", program, inputs, lambda made: alone.check(total, made["y"]))


def gated_case(case: GatedActivation) -> Case:
    program = gated_activation(n=case.x.shape[1] // 2, activation=case.activation, dtype=case.x.dtype.name)
    label = f"GatedActivation {case.activation} {_kind(case.x)}"
    return Case(label, program, {"x": case.x}, lambda made: case.check(made["y"]))


def gather_case(case: Gather, ids_dtype: str = "int64") -> Case:
    (n, k), w = case.codes.shape, nbits.pack_outputs(case.codes, case.bits)
    program = gather_nbits(n=n, k=k, bits=case.bits, group=case.group, ids_dtype=ids_dtype)
    inputs = {"ids": case.x.astype(ids_dtype), "w": as_words(w), "scales": as_words(case.scales.view(np.uint16))}
    label = f"GatherNBits {case.codes.shape} bits {case.bits} group {case.group} rows {len(case.x)}"
    return Case(label, program, inputs, lambda made: case.check(made["y"]))


def head_case(case: DenseMatMul, rows: int) -> Case:
    k_in, n = case.x.shape[1], len(case.codes)
    static = {"k_in": k_in, "n": n, "bits": case.bits, "group": case.group, "dtype": case.x.dtype.name}
    w = as_words(nbits.pack_outputs(case.codes, case.bits))
    inputs = {"x": case.x, "w": w, "scales": as_words(case.scales.view(np.uint16))}
    label = f"DenseMatMulNBits {_kind(case.x)} n {n} bits {case.bits} group {case.group} by {rows}"
    return Case(label, dense_matmul_nbits(**static, rows=rows), inputs, lambda made: case.check(made["y"]))


def float_head_case(rng: np.random.Generator, m: int, k_in: int, n: int, rows: int) -> Case:
    x, w = rng.standard_normal((m, k_in)).astype(np.float32), rng.standard_normal((n, k_in)).astype(np.float32)

    def check(made: dict[str, np.ndarray]) -> float:
        truth = x.astype(np.float64) @ w.astype(np.float64).T
        return largest_share(np.abs(made["y"] - truth), 2 * (k_in + 4) * EPS * (np.abs(x) @ np.abs(w).T))

    label = f"MatMul {_kind(x)} n {n} by {rows}"
    return Case(label, dense_matmul(k_in=k_in, n=n, rows=rows), {"x": x, "w": w}, check)


def float_case(case: SparseMatMul) -> Case:
    inputs = {"x": case.x, "w": case.weights.rows}
    return Case(
        _label("SparseMatMul", case), sparse_matmul(**_static(case)), inputs, lambda made: case.check(made["y"])
    )


def nbits_gemm_case(case: SparseMatMul) -> Case:
    bits = {3: 8, 4: 4}[case.weights.type]
    program = sparse_matmul_nbits_gemm(**_static(case), bits=bits, group=case.weights.group)
    inputs = {
        "x": case.x,
        "w": case.weights.rows.view(np.uint32),
        "scales": case.weights.scales.view(np.uint32),
    }
    exact = replace(case, fixed_point=False)
    label = f"{_label('SparseMatMulNBits', case)} {bits} bits group {case.weights.group}"
    return Case(label, program, inputs, lambda made: exact.check(made["y"]))


def _static(case: SparseMatMul) -> dict[str, Any]:
    selection = {"k": case.k, "block": case.block, "rescale": "l2" if case.rescale else "none"}
    return {"k_in": case.x.shape[1], "n": case.weights.outputs, "dtype": case.x.dtype.name, **selection}


def _label(op: str, case: SparseMatMul) -> str:
    sizes = f"n {case.weights.outputs} k {case.k} block {case.block} l2 {case.rescale}"
    return f"{op} {_kind(case.x)} {sizes}"


def attention_case(case: CachedAttention, slices: int, mask_dtype: str = "bool") -> Case:
    batch, kv_heads, capacity, width = case.past_key.shape
    tokens, total, dtype = case.x.shape[1], case.visible.shape[-1], case.x.dtype
    static = {"heads": case.heads, "kv_heads": kv_heads, "width": width, "dtype": dtype.name, "slices": slices}
    program = cached_attention(**static, mask_dtype=mask_dtype)
    room = ((0, 0), (0, 0), (0, max(total - capacity, 0)), (0, 0))
    inputs = {
        "qkv": case.x.reshape(batch * tokens, -1),
        "cos": np.cos(case.angles).astype(dtype),
        "sin": np.sin(case.angles).astype(dtype),
        "visible": case.visible[:, None].astype(mask_dtype),
        "key": np.pad(case.past_key, room),
        "value": np.pad(case.past_value, room),
    }

    def check(made: dict[str, np.ndarray]) -> float:
        return case.check(made["y"].reshape(batch, tokens, -1), made["key"], made["value"])

    label = f"CachedAttention {_kind(case.x)} past {total - tokens} heads {case.heads} in {slices}"
    return Case(label, program, inputs, check)


def _kind(x: np.ndarray) -> str:
    return f"{x.dtype} {x.shape}"


def layer_cases(seed: int, *, web: bool = False) -> Iterator[Case]:
    """Of all of them, some in float32 and some in float16; none without rows, outputs or inputs: there is no kernel for that.

    ``web``: those that WebGPU can have, whose buffers hold no bytes and no int64: ids and masks are int32.
    """
    rng = np.random.default_rng(seed)
    ids_dtype, mask_dtype = ("int32", "int32") if web else ("int64", "bool")
    yield from (norm_case(case) for case in _some(add_rms_norm_cases.cases(rng), 70))
    yield from (plain_norm_case(case) for case in _some(add_rms_norm_cases.cases(rng), 110))
    yield from (gated_case(case) for case in _some(gated_activation_cases.cases(rng), 70))
    gathers = [case for case in _some(gather_cases.cases(rng), 1) if not web or _in_words(case)]
    yield from (gather_case(case, ids_dtype) for case in gathers[:: 3 if web else 13])
    heads = [
        case for case in _some(dense_matmul_cases.cases(rng), 1) if len(case.codes) and (not web or _in_words(case))
    ]
    heads = heads[:: 6 if web else 25]
    yield from (head_case(case, (1, MANY_ROWS)[i % 2]) for i, case in enumerate(heads))
    for m, k_in, n, rows in ((1, 37, 130, 1), (9, 64, 5, MANY_ROWS)):
        yield float_head_case(rng, m, k_in, n, rows)
    products = [case for case in _some(sparse_matmul_cases.cases(rng), 1) if sum(case.weights.outputs)]
    floats = [case for case in products if not case.weights.group and case.weights.rows.dtype == case.x.dtype]
    yield from (float_case(case) for case in floats[::20])
    yield from (nbits_gemm_case(case) for case in [case for case in products if case.weights.group][5::40])
    x = magnitudes(rng, ROWS + 6, 33, "normal")
    yield nbits_gemm_case(SparseMatMul(x, integer_weights(rng, (65, 130), 33, 4, 32), 12))
    attention = _some(cached_attention_cases.cases(rng), 5)
    yield from (attention_case(case, (MANY_SLICES, 1)[i % 2], mask_dtype) for i, case in enumerate(attention))


def _in_words(case: Gather | DenseMatMul) -> bool:
    """Whether rows of codes and of scales are whole words."""
    k = case.codes.shape[1]
    return nbits.output_row_bytes(k, case.bits) % 4 == 0 and nbits.group_count(k, case.group) % 2 == 0


def is_float16(case: Case) -> bool:
    """Which PoCL does not have on a CPU."""
    return "float16" in dtypes_of(case)


def dtypes_of(case: Case) -> set[str]:
    """Of all tensors."""
    return {str(buffer.dtype) for buffer in case.program.buffers().values()}


def _some(cases: Iterator[Kind], every: int) -> list[Kind]:
    return [case for case in cases if 0 < case.x.size <= MOST_VALUES][::every]
