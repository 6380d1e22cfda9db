"""The kernels of a CPU as a set: a PrimFunc for each op and its static values, in one instruction set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import relax, tirx

from qsparse_export.runtimes.tvm.kernel_set import Result
from qsparse_export.runtimes.tvm.kernels.cached_attention import cached_attention
from qsparse_export.runtimes.tvm.kernels.dense_matmul import dense_matmul
from qsparse_export.runtimes.tvm.kernels.dense_matmul_nbits import dense_matmul_nbits
from qsparse_export.runtimes.tvm.kernels.gated_activation import gated_activation
from qsparse_export.runtimes.tvm.kernels.gather_nbits import gather_nbits
from qsparse_export.runtimes.tvm.kernels.rms_norm import add_rms_norm, rms_norm
from qsparse_export.runtimes.tvm.kernels.sparse_matmul import sparse_matmul
from qsparse_export.runtimes.tvm.kernels.sparse_matmul_nbits import sparse_matmul_nbits
from qsparse_export.runtimes.tvm.kernels.sparse_ternary_matmul import sparse_ternary_matmul
from qsparse_export.runtimes.tvm.kernels.topk_sparsify import topk_sparsify
from qsparse_export.runtimes.tvm.lanes import Lanes
from qsparse_export.runtimes.tvm.tiling import Tilings

_TILED: dict[str, Callable[..., tirx.PrimFunc]] = {
    make.__name__: make for make in (sparse_ternary_matmul, sparse_matmul_nbits, dense_matmul_nbits)
}
"""Products whose work is cut into tiles; their second argument are the weights."""
_PLAIN: dict[str, Callable[..., tirx.PrimFunc]] = {
    make.__name__: make
    for make in (
        add_rms_norm,
        cached_attention,
        dense_matmul,
        gated_activation,
        gather_nbits,
        rms_norm,
        sparse_matmul,
        topk_sparsify,
    )
}


class CpuKernels:
    """See :class:`~qsparse_export.runtimes.tvm.kernel_set.KernelSet`. ``tilings`` say how the work of a product is cut."""

    def __init__(self, lanes: Lanes, tilings: Tilings) -> None:
        self._lanes = lanes
        self._tilings = tilings
        self._made: dict[tuple[Any, ...], Any] = {}

    def call(
        self,
        builder: relax.BlockBuilder,
        name: str,
        arguments: list[Any],
        static: dict[str, Any],
        results: Sequence[Result],
    ) -> list[Any]:
        """See :class:`~qsparse_export.runtimes.tvm.kernel_set.KernelSet`."""
        if name in _TILED:
            row_bytes = int(arguments[1].ty.shape[-1])
            static = {**static, "tiling": self._tilings.choose(_TILED[name], static, row_bytes)}
        kernel = self._kernel(builder, {**_PLAIN, **_TILED}[name], static)
        types = [arguments[result].ty if isinstance(result, int) else result for result in results]
        in_place = [result if isinstance(result, int) else -1 for result in results]
        if any(place >= 0 for place in in_place):
            call = relax.op.call_tir_inplace(kernel, arguments, in_place, types)
        else:
            call = relax.op.call_tir(kernel, arguments, types if len(types) > 1 else types[0])
        made = builder.emit(call)
        return [made] if len(types) == 1 else [builder.emit(relax.TupleGetItem(made, i)) for i in range(len(types))]

    def _kernel(self, builder: relax.BlockBuilder, make: Callable[..., tirx.PrimFunc], static: dict[str, Any]) -> Any:
        """The kernel with these static values, made and added to the module once."""
        key = (make.__name__, *sorted(static.items()))
        if key not in self._made:
            private = make(self._lanes, **static).without_attr("global_symbol")  # the module names it
            self._made[key] = builder.add_func(private, make.__name__)
        return self._made[key]
