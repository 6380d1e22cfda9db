"""The order of the passes, with the reason beside each entry."""

from __future__ import annotations

from collections.abc import Collection

CLEAN = (
    "annotate-scope",  # first: later passes make nodes that do not know their PyTorch module
    "eliminate-identity",  # the exporter leaves aliases between custom ops
    "fold-constants",  # shape arithmetic of static dimensions; big tensors stay lazy
    "eliminate-common",  # one mask, one pair of cos and sin for all layers
    "eliminate-dead",  # what folding left behind
)

NARROW = (
    "float16",  # before the fusions, which read the Casts that it makes; after CLEAN, so that it makes each of them once
)

FUSE = (
    "fuse-sparse-ternary",  # after duplicates are gone: matrices share a mask only when it is one node
)

FUSE_NATIVE = {
    "fuse-glu": "GatedActivation",  # after the products are one node: only then is there nothing to join
    "fuse-norm": "AddRmsNorm",
    "fuse-attention": "CachedAttention",
}
"""Passes whose op pays only where its kernel runs (the body takes longer than what it replaces), and that op."""

LOWER = (
    "attach-bodies",  # the portable fallback and the specification of every custom op
    "infer-shapes",  # after the last rewrite, so that every value of the file carries its shape
    "sort-nodes",  # same graph, same bytes
    "check",  # nothing invalid leaves the compiler
)


def pipeline_for(native_ops: Collection[str], *, narrow: bool = False) -> str:
    """The spec string for a runtime that has kernels for ``native_ops``; none of them for a portable bundle.

    ``narrow``: float16 instead of float32.
    """
    native = tuple(name for name, op in FUSE_NATIVE.items() if op in native_ops)
    return ",".join(CLEAN + (NARROW if narrow else ()) + FUSE + native + LOWER)


DEFAULT = pipeline_for(FUSE_NATIVE.values())
