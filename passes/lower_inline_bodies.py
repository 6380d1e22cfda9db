"""Inlines the function bodies of our ops, for runtimes that know neither our library nor model-local functions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from qsparse_export.errors import UsageError
from qsparse_export.passes.annotate_scope import SCOPE
from qsparse_export.passes.base import Pass, PassResult
from qsparse_export.passes.original_choices import ROWS, UNFOLLOWED
from qsparse_export.passes.ternary_nbits import lower_to_nbits

DOMAIN = "ai.qsparse"
CHOICES = "ai.qsparse.choices"
"""Metadata key of a model without our ops: where the values stand that they chose by, for verification."""

FORMS = ("integer", "nbits")


@dataclass(frozen=True)
class InlineBodies(Pass):
    """Replaces every op of domain ``ai.qsparse`` by standard ones; ``ternary`` chooses the form of ternary products.

    Before::

        y = TernaryMatMul<n>(x, packed, scale)               # and a function body, or none yet

    After, ``ternary=integer`` (the body: bit-exact, MatMulInteger of uint8 activations and int8 weights)::

        y = Mul(Cast(MatMulInteger(Cast<uint8>(q), weights, 128)), descale)

    After, ``ternary=nbits`` (ONNX Runtime's com.microsoft::MatMulNBits, 2 bits, packed in memory too; activations are
    quantised in blocks of 128 instead of rows, so results differ by some 1e-3 and verification refuses them:
    docs/passes.md)::

        y = MatMulNBits<bits=2, block_size=128, accuracy_level=4>(x, codes, scales)

    INT2 weights bring nothing here: ONNX Runtime folds their Cast to INT8 as it folds the body's table.
    """

    name: ClassVar[str] = "inline-bodies"
    ternary: str = "integer"

    def call(self, model: ir.Model) -> PassResult:
        """See :class:`Pass`; UsageError for an unknown form."""
        from qsparse_export import ops

        if self.ternary not in FORMS:
            raise UsageError(f"pass inline-bodies: ternary={self.ternary}; expected one of {', '.join(FORMS)}")
        ours = [node for node in model.graph.all_nodes() if node.domain == DOMAIN]
        if not ours:
            return PassResult(model, False)
        choices = [_choice(node) for node in _followed(model)]
        if self.ternary == "nbits":
            lower_to_nbits(model)
        else:
            model.metadata_props[CHOICES] = json.dumps(choices)
        scopes = {
            str(output.name): node.metadata_props[SCOPE]
            for node in model.graph
            if node.domain == DOMAIN and SCOPE in node.metadata_props
            for output in node.outputs
        }
        ops.attach_functions(model)
        InlinePass(criteria=lambda function: function.domain == DOMAIN)(model)
        for identifier in [key for key in model.functions if key[0] == DOMAIN]:
            del model.functions[identifier]
        model.opset_imports.pop(DOMAIN, None)
        _restore_scopes(model.graph, scopes)
        return PassResult(model, True)


def _choice(node: ir.Node) -> dict[str, object]:
    """What a tap of ``node`` is made from: its op and attributes, and names and width of its values."""
    x, y = node.inputs[0], node.outputs[0]
    assert x is not None
    width = x.shape[-1] if x.shape is not None and len(x.shape) else None
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    return {
        "op": node.op_type,
        "attributes": {name: list(v) if isinstance(v, tuple) else v for name, v in attributes.items()},
        "input": x.name,
        "width": width if isinstance(width, int) else None,
        "output": y.name,
        "metadata": {key: node.metadata_props[key] for key in (SCOPE, ROWS) if key in node.metadata_props},
    }


def choosing_nodes(model: ir.Model) -> list[ir.Node]:
    """The ops of ours in ``model`` whose choices are followed, or stand-ins for those that were inlined."""
    if CHOICES not in model.metadata_props:
        return _followed(model)
    nodes = []
    for choice in json.loads(model.metadata_props[CHOICES]):
        x = ir.Value(name=choice["input"], shape=ir.Shape(["rows", choice["width"]]))
        node = ir.node(
            choice["op"], [x], attributes=choice["attributes"], domain=DOMAIN, metadata_props=choice["metadata"]
        )
        node.outputs[0].name = choice["output"]
        nodes.append(node)
    return nodes


def _followed(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.domain == DOMAIN and UNFOLLOWED not in node.metadata_props]


def _restore_scopes(graph: ir.Graph, scopes: dict[str, str]) -> None:
    """Nodes of a body take the scope of the call that they were: that of the output behind them."""
    current = ""
    for node in reversed(graph):
        known = [scopes[str(output.name)] for output in node.outputs if str(output.name) in scopes]
        current = known[0] if known else node.metadata_props.get(SCOPE, current)
        if current and SCOPE not in node.metadata_props:
            node.metadata_props[SCOPE] = current
