"""The operators of the domain ``ai.qsparse``: one table, resolved on use; importing this imports neither torch nor onnx."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qsparse_export.errors import UsageError, near_names
from qsparse_export.ops.base import BODY_OPSET, DOMAIN, VERSION, Op

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "BODY_OPSET",
    "DOMAIN",
    "OPS",
    "VERSION",
    "Op",
    "attach_functions",
    "functions",
    "op",
    "register",
    "translation_table",
]

OPS: dict[str, str] = {
    "TopKSparsify": "qsparse_export.ops.topk_sparsify",
    "TernaryMatMul": "qsparse_export.ops.ternary_matmul",
    "SparseTernaryMatMul": "qsparse_export.ops.sparse_ternary_matmul",
    "SparseMatMul": "qsparse_export.ops.sparse_matmul",
    "SparseMatMulNBits": "qsparse_export.ops.sparse_matmul_nbits",
    "DenseMatMulNBits": "qsparse_export.ops.dense_matmul_nbits",
    "GatherNBits": "qsparse_export.ops.gather_nbits",
    "CachedAttention": "qsparse_export.ops.cached_attention",
    "GatedActivation": "qsparse_export.ops.gated_activation",
    "AddRmsNorm": "qsparse_export.ops.add_rms_norm",
}
"""ONNX name of each op -> the module that holds everything about it, in its constant ``OP``."""


def op(name: str) -> Op:
    """The operator called ``name``; UsageError with near names when there is none."""
    if name not in OPS:
        raise UsageError(f"no operator {DOMAIN}::{name}; {near_names(name, OPS)}")
    return importlib.import_module(OPS[name]).OP


def register() -> None:
    """Defines the torch ops (``torch.ops.qsparse``) and registers the ONNX schemas; idempotent."""
    for name in OPS:
        op(name).register_schema()


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What ``torch.onnx.export(custom_translation_table=...)`` needs to keep the ops whole; registers them first."""
    register()
    entries = [op(name) for name in OPS]
    return {entry.torch_op: entry.translate for entry in entries if entry.torch_op and entry.translate}


def functions(model: ir.Model) -> list[ir.Function]:
    """Function bodies of the ops that ``model`` uses, in its graph, its subgraphs, its functions or these bodies."""
    bodies: dict[str, ir.Function] = {}
    graphs = [model.graph, *(function.graph for function in model.functions.values())]
    while graphs:
        for node in graphs.pop().all_nodes():
            name = node.op_type
            if node.domain != DOMAIN or name in bodies:
                continue
            if name not in OPS:
                raise UsageError(
                    f"the model uses {DOMAIN}::{name}, which has no function body; {near_names(name, OPS)}"
                )
            bodies[name] = op(name).body()
            graphs.append(bodies[name].graph)
    return [bodies[name] for name in OPS if name in bodies]


def attach_functions(model: ir.Model) -> ir.Model:
    """Adds to ``model`` the bodies of the ops that it uses and imports their opset, in place; idempotent.

    UsageError when the model's opset is not the one the bodies are written in (an ONNX function must share it).
    """
    bodies = functions(model)
    opset = model.opset_imports.get("")
    if bodies and opset not in (None, BODY_OPSET):
        raise UsageError(f"the model has opset {opset}; the function bodies need {BODY_OPSET}: export with that opset")
    for body in bodies:
        model.functions.setdefault(body.identifier(), body)
        model.opset_imports[DOMAIN] = VERSION
    return model
