"""The order of the passes, with the reason beside each entry."""

from __future__ import annotations

from collections.abc import Collection, Mapping

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

NARROW = (
    "float16",  # before the fusions, which read the Casts that it makes; after CLEAN, so that it makes each of them once
)

FUSE = (
    "fuse-sparse-ternary",  # after duplicates are gone: matrices share a mask only when it is one node
    "fuse-sparse-nbits",
    "fuse-sparse-matmul",  # not where the provider's own product is all there is: it reads no zero less for our op's body
)

FUSE_PROVIDER = {
    "fuse-gqa{padding=right},eliminate-dead": ("CachedAttention", "com.microsoft::GroupQueryAttention"),
}
"""Passes for a provider that is not the CPU's: where no kernel of ours runs the first op, and it runs the second."""

FUSE_NATIVE = {
    "fuse-glu": "GatedActivation",  # after the products are one node: only then is there nothing to join
    "fuse-norm": "AddRmsNorm",
    "fuse-attention": "CachedAttention",
}
"""Passes whose op pays only where its kernel runs (the body takes longer than what it replaces), and that op."""

LAST = (
    "last-logits",  # after FUSE: the head may have become another op; before the shapes are inferred anew
)

LOWER_PROVIDER = {
    "lower-nbits": ("DenseMatMulNBits", "com.microsoft::MatMulNBits"),  # behind last-logits, which looks for the head
}
"""As FUSE_PROVIDER."""

LOWER_LACKING = {
    "infer-shapes,lower-experts": "NonZero",  # after FUSE, and before attach-bodies: it makes a TopKSparsify
}
"""Passes that lower a standard op, for runtimes that lack it on a device."""

LOWER = (
    "attach-bodies",  # the portable fallback and the specification of every custom op
    "infer-shapes",  # after the last rewrite, so that every value of the file carries its shape
    "annotate-sparsity",  # for whoever inspects the file: it needs the widths
    "sort-nodes",  # same graph, same bytes
    "check",  # nothing invalid leaves the compiler
)


def pipeline_for(
    native_ops: Collection[str],
    *,
    provider_ops: Collection[str] = (),
    lacking_ops: Collection[str] = (),
    narrow: bool = False,
    last_logits: bool = False,
) -> str:
    """The spec string for a runtime that has kernels for ``native_ops``; none of them for a portable bundle.

    ``provider_ops``: what the runtime itself runs on a device that is no CPU. ``lacking_ops``: standard ops that nothing runs
    there. ``narrow``: float16 instead of float32.
    ``last_logits``: logits of the last position alone.
    """
    last = LAST if last_logits else ()
    lower = _provided(LOWER_PROVIDER, native_ops, provider_ops) + _lacking(lacking_ops) + LOWER
    return ",".join(CLEAN + (NARROW if narrow else ()) + _fuse(native_ops, provider_ops) + last + lower)


def foreign_pipeline_for(
    native_ops: Collection[str], *, provider_ops: Collection[str] = (), lacking_ops: Collection[str] = ()
) -> str:
    """The same for a graph that another exporter wrote."""
    return ",".join(IMPORT + CLEAN + _fuse(native_ops, provider_ops) + _lacking(lacking_ops) + LOWER)


def _lacking(lacking_ops: Collection[str]) -> tuple[str, ...]:
    return tuple(names for names, op in LOWER_LACKING.items() if op in lacking_ops)


def _fuse(native_ops: Collection[str], provider_ops: Collection[str]) -> tuple[str, ...]:
    is_own = "SparseMatMul" in native_ops or not provider_ops
    fuse = tuple(name for name in FUSE if name != "fuse-sparse-matmul" or is_own)
    native = tuple(name for name, op in FUSE_NATIVE.items() if op in native_ops)
    return fuse + native + _provided(FUSE_PROVIDER, native_ops, provider_ops)


def _provided(
    passes: Mapping[str, tuple[str, str]], native_ops: Collection[str], provider_ops: Collection[str]
) -> tuple[str, ...]:
    return tuple(names for names, (own, other) in passes.items() if own not in native_ops and other in provider_ops)


FOREIGN = foreign_pipeline_for(FUSE_NATIVE.values())
"""Of a graph that another exporter wrote, where every kernel runs."""

DEFAULT = pipeline_for(FUSE_NATIVE.values())
