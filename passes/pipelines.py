"""The order of the passes, with the reason beside each entry."""

from __future__ import annotations

IMPORT = (
    "inline-functions",  # rules see one flat graph
    "convert-opset",  # the function bodies are written in one opset
    "infer-shapes",  # a mask is one only where its shape is that of what it masks
    "annotate-scope",  # as in CLEAN, before rules make nodes
    "eliminate-identity",  # what detach() and aliases leave
    "fold-constants",  # k and shapes of static dimensions
    "infer-shapes",  # what folding made known
    "fuse-topk",  # before duplicates go: each mask knows by which names to find it in the original
    "fuse-ternary",  # after the masks: a quantiser may stand behind one
)

CLEAN = (
    "annotate-scope",  # first: later passes make nodes that do not know their PyTorch module
    "eliminate-identity",  # the exporter leaves aliases between custom ops
    "fold-constants",  # shape arithmetic of static dimensions; big tensors stay lazy
    "eliminate-common",  # one mask, one pair of cos and sin for all layers
    "eliminate-dead",  # what folding left behind
)

FUSE = (
    "fuse-sparse-ternary",  # after duplicates are gone: matrices share a mask only when it is one node
    "fuse-sparse-nbits",
    "fuse-sparse-matmul",
)

LOWER = (
    "attach-bodies",  # the portable fallback and the specification of every custom op
    "infer-shapes",  # after the last rewrite, so that every value of the file carries its shape
    "sort-nodes",  # same graph, same bytes
    "check",  # nothing invalid leaves the compiler
)

FOREIGN = ",".join(IMPORT + CLEAN + FUSE + LOWER)
"""Of a graph that another exporter wrote."""

DEFAULT = ",".join(CLEAN + FUSE + LOWER)
