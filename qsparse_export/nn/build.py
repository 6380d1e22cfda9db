"""Which linear a place in the decoder gets: Q-Sparse or BitNet, and with which mask."""

from __future__ import annotations

from qsparse_export.config import ModelConfig, topk_of
from qsparse_export.nn.linear import BitLinear, QSparseLinear


def block_linear(config: ModelConfig, name: str, inputs: int, outputs: int, bias: bool) -> QSparseLinear | BitLinear:
    """The linear whose full name is ``name`` (``model.layers.0.mlp.down_proj``), masked as ``config.sparsity`` says."""
    topk = topk_of(config.sparsity, name)
    if config.quantization == "bitnet":
        return BitLinear(inputs, outputs, topk, bias, config.linear_norm_eps if config.linear_norm else None)
    return QSparseLinear(inputs, outputs, topk, bias)
