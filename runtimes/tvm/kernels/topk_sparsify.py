"""TopKSparsify over rows (:mod:`qsparse_export.ops.topk_sparsify` has the definition)."""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from qsparse_export.runtimes.tvm.kernels.active_channels import Selection, load_row, mask
from qsparse_export.runtimes.tvm.kernels.emit import for_rows, in_vectors, load, store
from qsparse_export.runtimes.tvm.lanes import Lanes


def topk_sparsify(lanes: Lanes, *, k_in: int, k: int, block: int, rescale: str) -> tirx.PrimFunc:
    """x float32 [M, k_in] to the masked y float32 [M, k_in]."""
    m = tirx.Var("m", "int64")
    selection = Selection(k_in, k, block, rescale)
    padded = selection.padded(lanes.floats)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("topk_sparsify")
        T.func_attr({"tirx.noalias": True})
        x = T.arg("x", T.buffer((m, k_in), "float32"))
        y = T.arg("y", T.buffer((m, k_in), "float32"))

        def mask_row(row: tirx.Expr) -> None:
            values = T.alloc_buffer((padded,), "float32")
            largest = T.alloc_buffer((1,), "int32", scope="local")
            load_row(x, row, k_in, lanes.floats, values, padded)
            mask(selection, lanes.floats, values, largest)
            in_vectors(k_in, lanes.floats, lambda c, here: store(y, load(values, [], c, here), [row], c, here))

        for_rows(m, mask_row)
    return builder.get()
