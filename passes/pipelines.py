"""The order of the passes, with the reason beside each entry."""

from __future__ import annotations

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

DEFAULT = ",".join(CLEAN + FUSE + LOWER)
