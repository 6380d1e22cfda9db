"""Graph passes: one literal table, name -> "module:Class", resolved on use."""

from __future__ import annotations

PASSES: dict[str, str] = {
    "annotate-scope": "annotate_scope:AnnotateScope",
    "attach-bodies": "lower_attach_bodies:AttachBodies",
    "check": "clean_check:Check",
    "decompose": "lower_decompose:Decompose",
    "eliminate-common": "clean_eliminate:EliminateCommon",
    "eliminate-dead": "clean_eliminate:EliminateDead",
    "eliminate-identity": "clean_eliminate:EliminateIdentity",
    "float16": "lower_float16:Float16",
    "fold-constants": "clean_fold_constants:FoldConstants",
    "fuse-attention": "fuse_attention:FuseAttention",
    "fuse-glu": "fuse_glu:FuseGlu",
    "fuse-gqa": "fuse_gqa:FuseGqa",
    "fuse-norm": "fuse_norm:FuseNorm",
    "fuse-sparse-ternary": "fuse_sparse_ternary:FuseSparseTernary",
    "infer-shapes": "clean_infer_shapes:InferShapes",
    "inline-bodies": "lower_inline_bodies:InlineBodies",
    "pack-tied": "pack_tied:PackTied",
    "sort-nodes": "clean_sort_nodes:SortNodes",
}
