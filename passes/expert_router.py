"""The router of a mixture of experts: the k largest chances of each row, each in its place, without sorting or scattering."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from qsparse_export.passes.fuse_topk_around import new_mask
from qsparse_export.passes.fuse_topk_masks import is_filled_with, last_axis, produced_by, same_shape, topk_of_indices
from qsparse_export.passes.match import replaced
from qsparse_export.passes.original_choices import UNFOLLOWED
from qsparse_export.passes.static_values import elements


@dataclass(frozen=True)
class Router:
    """``scatter`` puts the ``k`` largest of ``chances`` in their places, divided by their sum where there is ``total``."""

    scatter: ir.Node
    chances: ir.Value
    k: int
    total: ir.Node | None


def match_router(node: ir.Node) -> Router | None:
    """The router that ends in ``node``. Chances are a softmax: none is negative, so that magnitudes rank them."""
    if node.domain or node.op_type != "ScatterElements" or node.attributes.get_string("reduction", "none") != "none":
        return None
    data, indices, updates = node.inputs
    topk = topk_of_indices(indices)
    if topk is None or topk.attributes.get_int("largest", 1) != 1 or not is_filled_with(data, 0):
        return None
    chances, k = topk.inputs[0], elements(topk.inputs[1])
    softmax = produced_by(chances, "Softmax")
    if chances is None or softmax is None or k is None or not same_shape(data, chances):
        return None
    axes = (
        topk.attributes.get_int("axis", -1),
        node.attributes.get_int("axis", 0),
        softmax.attributes.get_int("axis", -1),
    )
    if not all(last_axis(axis, chances) for axis in axes):
        return None
    divided = produced_by(updates, "Div")
    if divided is None:
        return Router(node, chances, int(k.item()), None) if updates is topk.outputs[0] else None
    total = produced_by(divided.inputs[1], "ReduceSum")
    if total is None or divided.inputs[0] is not topk.outputs[0] or total.inputs[0] is not topk.outputs[0]:
        return None
    over = elements(total.inputs[1]) if len(total.inputs) > 1 else None
    if over is None or over.size != 1 or not last_axis(int(over.item()), chances):
        return None
    return Router(node, chances, int(k.item()), total) if total.attributes.get_int("keepdims", 1) == 1 else None


def rewrite_router(graph: ir.Graph, router: Router) -> None:
    """Puts TopKSparsify in its place, and the division behind it."""
    mask = new_mask(router.chances, router.k, 0, "none", router.scatter)
    mask.metadata_props[UNFOLLOWED] = router.scatter.op_type
    graph.insert_before(router.scatter, mask)
    result = mask.outputs[0]
    if router.total is not None:
        metadata = dict(router.scatter.metadata_props)
        result.name = f"{router.scatter.outputs[0].name}.best"
        attributes = {"keepdims": 1}
        total = ir.node("ReduceSum", [result, router.total.inputs[1]], attributes, metadata_props=metadata)
        total.outputs[0].name = f"{result.name}.sum"
        divided = ir.node("Div", [result, total.outputs[0]], metadata_props=dict(metadata))
        graph.insert_before(router.scatter, [total, divided])
        result = divided.outputs[0]
    replaced(router.scatter.outputs[0], result)
    graph.remove(router.scatter, safe=True)
