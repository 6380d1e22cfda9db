"""The kernels of an NVIDIA GPU as a set: each op is the kernels of a program, with scratch that Relax allocates.

Few rows and many take different programs. A function of Relax has the branch between them, and each program is a function of
its own: TVM 0.27 plans the memory of both sides of a branch as if they ran one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tvm import ir, relax, tirx
from tvm_ffi import StructuralKey

from qsparse_export.runtimes.tvm.gpu.cached_attention import MANY_SLICES, cached_attention
from qsparse_export.runtimes.tvm.gpu.dense_matmul import MANY_ROWS, dense_matmul, dense_matmul_nbits
from qsparse_export.runtimes.tvm.gpu.gated_activation import gated_activation
from qsparse_export.runtimes.tvm.gpu.gather_nbits import gather_nbits
from qsparse_export.runtimes.tvm.gpu.nbits_gemm import sparse_matmul_nbits_gemm
from qsparse_export.runtimes.tvm.gpu.packed_bytes import dp4a
from qsparse_export.runtimes.tvm.gpu.program import Program
from qsparse_export.runtimes.tvm.gpu.rms_norm import add_rms_norm, rms_norm
from qsparse_export.runtimes.tvm.gpu.sparse_matmul import sparse_matmul
from qsparse_export.runtimes.tvm.gpu.sparse_matmul_nbits import sparse_matmul_nbits
from qsparse_export.runtimes.tvm.gpu.sparse_ternary_matmul import GEMM_ROWS, sparse_ternary_gemm, sparse_ternary_gemv
from qsparse_export.runtimes.tvm.gpu.topk_sparsify import topk_sparsify
from qsparse_export.runtimes.tvm.kernel_set import Result

_Make = Callable[..., Program]
_KEY_OF: Any = StructuralKey
"""Made of an object alone; its declaration says otherwise."""


@dataclass(frozen=True)
class _Choice:
    """``many`` from ``rows`` on, else ``few``."""

    few: _Make
    many: _Make
    rows: int


_PROGRAMS: dict[str, _Make | _Choice] = {
    "add_rms_norm": add_rms_norm,
    "cached_attention": _Choice(partial(cached_attention, slices=MANY_SLICES), cached_attention, GEMM_ROWS),
    "dense_matmul": _Choice(dense_matmul, partial(dense_matmul, rows=MANY_ROWS), MANY_ROWS // 2),
    "dense_matmul_nbits": _Choice(dense_matmul_nbits, partial(dense_matmul_nbits, rows=MANY_ROWS), MANY_ROWS // 2),
    "gated_activation": gated_activation,
    "gather_nbits": gather_nbits,
    "rms_norm": rms_norm,
    "sparse_matmul": _Choice(sparse_matmul, partial(sparse_matmul, slices=1), GEMM_ROWS),
    "sparse_matmul_nbits": _Choice(sparse_matmul_nbits, sparse_matmul_nbits_gemm, GEMM_ROWS),
    "sparse_ternary_matmul": _Choice(
        partial(sparse_ternary_gemv, dot=dp4a), partial(sparse_ternary_gemm, dot=dp4a), GEMM_ROWS
    ),
    "topk_sparsify": topk_sparsify,
}


class CudaKernels:
    """See :class:`~qsparse_export.runtimes.tvm.kernel_set.KernelSet`."""

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], Program | ir.GlobalVar] = {}
        self._kernels: dict[StructuralKey, Any] = {}

    def call(
        self,
        builder: relax.BlockBuilder,
        name: str,
        arguments: list[Any],
        static: dict[str, Any],
        results: Sequence[Result],
    ) -> list[Any]:
        """See :class:`~qsparse_export.runtimes.tvm.kernel_set.KernelSet`."""
        found = _PROGRAMS[name]
        key = (name, *sorted(static.items()))
        if key not in self._made:
            self._made[key] = (
                self._branch(builder, name, found, static) if isinstance(found, _Choice) else found(**static)
            )
        made = self._made[key]
        if isinstance(made, Program):
            return self._emitted(builder, builder, made, arguments)
        made = builder.emit(relax.Call(made, arguments))
        return [made] if len(results) == 1 else [builder.emit(relax.TupleGetItem(made, i)) for i in range(len(results))]

    def _branch(self, builder: relax.BlockBuilder, name: str, choice: _Choice, static: dict[str, Any]) -> ir.GlobalVar:
        """The function that takes the one program or the other."""
        few, many = choice.few(**static), choice.many(**static)
        functions = [self._function(builder, f"{name}_{rows}", each) for rows, each in (("few", few), ("many", many))]

        def taken(inner: relax.BlockBuilder, parameters: list[Any], sizes: dict[str, Any]) -> Any:
            few_rows, many_rows = (relax.SeqExpr([], relax.Call(each, parameters)) for each in functions)
            return inner.emit(relax.If(sizes["m"] < choice.rows, few_rows, many_rows))

        return builder.add_func(_private(few, taken), name)

    def _function(self, builder: relax.BlockBuilder, name: str, program: Program) -> Any:
        def taken(inner: relax.BlockBuilder, parameters: list[Any], _sizes: dict[str, Any]) -> Any:
            results = self._emitted(builder, inner, program, parameters)
            return results[0] if len(results) == 1 else relax.Tuple(results)

        return builder.add_func(_private(program, taken), name)

    def _emitted(
        self, builder: relax.BlockBuilder, inner: relax.BlockBuilder, program: Program, arguments: list[Any]
    ) -> list[Any]:
        """The program's kernels in order, called by what ``inner`` makes; ``builder`` has the module."""
        known = dict(zip(program.inputs, arguments, strict=True))
        sizes = program.sizes({name: argument.ty.shape for name, argument in known.items()})
        shapes = program.shapes(sizes)
        written: set[str] = set()
        for kernel in program.kernels:
            names = [parameter.name for parameter in kernel.params]
            given = [name for name in names if name in known]
            made = [name for name in names if name not in known]
            types = [
                relax.TensorType(shapes[each.name], str(each.dtype)) for each in kernel.params if each.name in made
            ]
            function, values = self._added(builder, kernel), [known[name] for name in given]
            in_place = [name for name in program.in_place if name in given and name not in written]
            if in_place:
                places = [given.index(name) for name in in_place] + [-1] * len(made)
                types = [known[name].ty for name in in_place] + types
                written |= set(in_place)
                call = relax.op.call_tir_inplace(function, values, places, types)
            else:
                call = relax.op.call_tir(function, values, types if len(types) > 1 else types[0])
            result = inner.emit(call)
            for i, name in enumerate([*in_place, *made]):
                known[name] = result if len(types) == 1 else inner.emit(relax.TupleGetItem(result, i))
        return [known[name] for name in (*program.outputs, *program.in_place)]

    def _added(self, builder: relax.BlockBuilder, kernel: tirx.PrimFunc) -> Any:
        """In the module, once: programs share kernels."""
        key = _KEY_OF(kernel)
        if key not in self._kernels:
            name = str(kernel.attrs["global_symbol"])
            private = kernel.without_attr("global_symbol").with_attr("tirx.is_scheduled", True)  # the module names it
            self._kernels[key] = builder.add_func(private, name)
        return self._kernels[key]


def _private(program: Program, body: Callable[[relax.BlockBuilder, list[Any], dict[str, Any]], Any]) -> relax.Function:
    """A function of the program's inputs; ``body`` emits what it returns, from parameters and sizes."""
    buffers = program.buffers()
    names = {size.name for name in program.inputs for size in buffers[name].shape if isinstance(size, tirx.Var)}
    sizes = {name: tirx.Var(name, "int64") for name in sorted(names)}
    shapes = program.shapes(sizes)
    parameters = [relax.Var(name, relax.TensorType(shapes[name], str(buffers[name].dtype))) for name in program.inputs]
    inner = relax.BlockBuilder()
    with inner.function("main", parameters, private=True):
        inner.emit_func_output(body(inner, parameters, sizes))
    return inner.get()["main"]
