"""The same op as TVM compiles it, as a contender of :mod:`qsparse_export.bench.kernels`: on our weights, where they lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qsparse_export.bench.graphs import SCALE, Graph
from qsparse_export.bench.timing import Contender
from qsparse_export.formats import nbits, ternary

if TYPE_CHECKING:
    from qsparse_export.bench.kernels import Case

PREFIX = "tvm-"


@dataclass(frozen=True)
class _Op:
    """A kernel: its function, static values but for the tiling, and its operands behind x; ``w`` is the shape of a matrix."""

    make: Callable[..., Any]
    static: dict[str, Any]
    w: tuple[int, int] | None
    small: tuple[np.ndarray, ...]
    is_tiled: bool = True


def contender(
    case: Case, graph: Graph, x: np.ndarray, calls: int, judge: Callable[[np.ndarray], None]
) -> tuple[str, Contender]:
    """Its name, with the instruction set, and a run over all weights of ``graph``, ``calls`` times each.

    Raises TargetError where TVM is missing, and what ``judge`` raises.
    """
    from qsparse_export.runtimes.tvm import codegen, environment
    from qsparse_export.runtimes.tvm.tiling import default_tiling
    from qsparse_export.targets.target import load_target

    tvm = environment.tvm()
    host = load_target("cpu")
    lanes = codegen.lanes_of(host)
    op = _op(case)
    static = op.static | ({"tiling": default_tiling(op.w[1] if op.w else 0, case.threads)} if op.is_tiled else {})
    module = tvm.IRModule({"kernel": op.make(lanes, **static).with_attr("global_symbol", "kernel")})
    kernel = tvm.compile(module, target=codegen.tvm_target(host))["kernel"]
    environment.use_threads(case.threads)
    given, small = tvm.runtime.tensor(x), [tvm.runtime.tensor(array) for array in op.small]
    width = case.k if op.w is None else case.n
    y = tvm.runtime.tensor(np.zeros((len(x), width), np.float32))
    operands = [(given, *((tensor,) if tensor is not None else ()), *small, y) for tensor in _weights(tvm, op, graph)]
    kernel(*operands[0])
    judge(y.numpy())

    def run() -> None:
        environment.use_threads(case.threads)
        for _ in range(calls):
            for one in operands:
                kernel(*one)

    return PREFIX + lanes.name, Contender(run, len(operands) * calls)


def _weights(tvm: Any, op: _Op, graph: Graph) -> list[Any]:
    """The matrix of each node over the mapped file; None for each node of an op without weights."""
    if op.w is None:
        return [None] * graph.copies
    content = np.memmap(Path(graph.weights or ""), np.uint8, "c")  # DLPack has no word for memory that is only read
    size = op.w[0] * op.w[1]
    starts = [i * graph.stride for i in range(graph.copies)]
    return [tvm.runtime.from_dlpack(content[start : start + size].reshape(op.w)) for start in starts]


def _op(case: Case) -> _Op:
    from qsparse_export.runtimes.tvm.kernels.dense_matmul_nbits import dense_matmul_nbits
    from qsparse_export.runtimes.tvm.kernels.sparse_matmul_nbits import sparse_matmul_nbits
    from qsparse_export.runtimes.tvm.kernels.sparse_ternary_matmul import sparse_ternary_matmul
    from qsparse_export.runtimes.tvm.kernels.topk_sparsify import topk_sparsify

    k, n, groups = case.k, case.n, nbits.group_count(case.k, case.group)
    nothing = {"k_in": k, "k": k, "block": 0, "rescale": "none"}
    weights = {"bits": case.bits, "group": case.group}
    if case.op == "ternary":
        scale = np.array([SCALE], np.float32)
        return _Op(sparse_ternary_matmul, {**nothing, "n": (n,)}, (k, ternary.row_bytes(n)), (scale,))
    if case.op == "nbits":
        columns = nbits.columns(n)
        scales = np.full((groups, columns), SCALE, np.float16)
        shape = (k, columns * case.bits // 8)
        return _Op(sparse_matmul_nbits, {**nothing, **weights, "n": (n,)}, shape, (scales,))
    if case.op == "head":
        scales = np.full((n, groups), SCALE, np.float16)
        shape = (n, nbits.output_row_bytes(k, case.bits))
        return _Op(dense_matmul_nbits, {"k_in": k, "n": n, **weights}, shape, (scales,))
    return _Op(topk_sparsify, {**nothing, "k": case.kept}, None, (), is_tiled=False)
