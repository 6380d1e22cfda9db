"""Graph passes: one literal table, name -> "module:Class", resolved on use."""

from __future__ import annotations

PASSES: dict[str, str] = {
    "annotate-scope": "annotate_scope:AnnotateScope",
    "annotate-sparsity": "annotate_sparsity:AnnotateSparsity",
    "attach-bodies": "lower_attach_bodies:AttachBodies",
    "check": "clean_check:Check",
    "convert-opset": "clean_convert_opset:ConvertOpset",
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
    "fuse-sparse-matmul": "fuse_sparse_matmul:FuseSparseMatMul",
    "fuse-sparse-nbits": "fuse_sparse_nbits:FuseSparseNBits",
    "fuse-sparse-ternary": "fuse_sparse_ternary:FuseSparseTernary",
    "fuse-ternary": "fuse_ternary:FuseTernary",
    "fuse-topk": "fuse_topk:FuseTopK",
    "infer-shapes": "clean_infer_shapes:InferShapes",
    "inline-bodies": "lower_inline_bodies:InlineBodies",
    "inline-functions": "clean_inline_functions:InlineFunctions",
    "last-logits": "lower_last_logits:LastLogits",
    "lower-experts": "lower_experts:LowerExperts",
    "lower-nbits": "lower_nbits:LowerNBits",
    "pack-tied": "pack_tied:PackTied",
    "sort-nodes": "clean_sort_nodes:SortNodes",
}
