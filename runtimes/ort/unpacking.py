"""What ONNX Runtime makes of packed weights when it opens function bodies, and a small memory must hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

TERNARY = frozenset({"TernaryMatMul", "SparseTernaryMatMul"})
UNPACKED_PER_BYTE = 16
"""A byte of four ternary weights becomes an int32 index and, three times, four int8 weights: gathered, reshaped, cut to size.

ONNX Runtime (1.30, Node) folds these constants of all matrices before it frees the first: on models of 0.3 and 0.7 billion
ternary weights the process grew by this and the file, to 2 %.
"""


def unpacked_bytes(model: ir.Model) -> int:
    """Bytes beside the weights themselves that opening ``model`` takes where no kernel library runs its ternary products.

    Counts ops of domain ``ai.qsparse``; 0 for a graph whose bodies were inlined.
    """
    return sum(
        UNPACKED_PER_BYTE * node.inputs[1].const_value.nbytes
        for node in model.graph.all_nodes()
        if node.domain == "ai.qsparse"
        and node.op_type in TERNARY
        and node.inputs[1] is not None
        and node.inputs[1].const_value is not None
    )
