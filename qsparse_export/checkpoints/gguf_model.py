"""A GGUF file of the ``llama`` or ``qwen2`` architecture: configuration, weights by Hugging Face names, tokenizer.

llama.cpp's converter reorders the rows of q and k for the ``llama`` architecture, from rotary halves to interleaved
pairs; this is undone here (source: ``LlamaModel.permute`` of convert_hf_to_gguf.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from qsparse_export.checkpoints.expected import check_config, check_tensors
from qsparse_export.checkpoints.gguf_header import GgufHeader, GgufTensor, read_gguf_header
from qsparse_export.checkpoints.gguf_tokenizer import gguf_tokenizer
from qsparse_export.checkpoints.model import Model, model_name
from qsparse_export.config import ModelConfig, RopeScaling
from qsparse_export.errors import CheckpointError, near_names
from qsparse_export.weights import require_finite

if TYPE_CHECKING:
    import torch

_ARCHITECTURES: tuple[Literal["llama", "qwen2"], ...] = ("llama", "qwen2")
# Types with a dequantiser in the gguf package.
READABLE_TYPES = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0", "IQ4_NL", "IQ4_XS"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"),
)
_WHOLE_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"
_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class GgufWeights:
    """A WeightSource over one GGUF file; quantised tensors are read as float32, others in their own type."""

    path: Path
    tensors: Mapping[str, GgufTensor]
    paired_heads: Mapping[str, int]

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name to shape."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        """One tensor, dequantised a few rows at a time; CheckpointError on NaN or Inf."""
        tensor = read_tensor(self.path, self.tensors[name])
        heads = self.paired_heads.get(name)
        if heads is not None:
            rest = tensor.shape[1:]
            tensor = tensor.reshape(heads, -1, 2, *rest).swapaxes(1, 2).reshape(tensor.shape)
        require_finite(name, tensor)
        return tensor


def read_tensor(path: Path, tensor: GgufTensor) -> torch.Tensor:
    """The tensor in row-major order: float32, or float16 and bfloat16 as stored."""
    import torch
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    raw = np.memmap(path, np.uint8, "r", tensor.offset, (tensor.nbytes,)).view(np.ndarray)  # ndarray slices faster
    plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(tensor.kind)
    if plain is not None:
        return torch.from_numpy(np.array(raw)).view(plain).reshape(tensor.shape)
    rows = math.prod(tensor.shape[:-1])
    packed = raw.reshape(rows, -1)
    values = np.empty((rows, tensor.shape[-1]), np.float32)
    step = max(1, _CHUNK_ELEMENTS // tensor.shape[-1])
    with np.errstate(all="ignore"):  # Inf scales of a damaged file are found in the result
        for row in range(0, rows, step):
            values[row : row + step] = dequantize(packed[row : row + step], GGMLQuantizationType[tensor.kind])
    return torch.from_numpy(values.reshape(tensor.shape))


def read_gguf(path: Path) -> Model:
    """Raises CheckpointError for a damaged file, another architecture, or types and features that are not supported."""
    header = read_gguf_header(path)
    architecture = header.metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise CheckpointError(
            f"{path} is a GGUF of the architecture {architecture!r}, which is not supported; "
            f"{near_names(str(architecture), _ARCHITECTURES)}: for other models name the transformers folder"
        )
    if _get(header, "split.count", int, 1) > 1:
        raise CheckpointError(
            f"{path} is one part of a split GGUF; merge the parts with llama-gguf-split --merge first"
        )
    tensors = _renamed(header)
    config = _config(header, architecture, tensors)
    check_config(config, str(path))
    check_tensors({name: tensor.shape for name, tensor in tensors.items()}, config, str(path))
    for name, tensor in tensors.items():
        if tensor.kind not in READABLE_TYPES:
            raise CheckpointError(f"{path}: {name} has the type {tensor.kind}; expected {', '.join(READABLE_TYPES)}")
    paired = {}
    if architecture == "llama":
        for name in tensors:
            if ".self_attn.q_proj." in name:
                paired[name] = config.heads
            elif ".self_attn.k_proj." in name:
                paired[name] = config.kv_heads
    return Model(
        name=model_name(path),
        config=config,
        weights=GgufWeights(path, tensors, paired),
        tokenizer=gguf_tokenizer(header),
        source_format="gguf",
        source=(path,),
    )


def _renamed(header: GgufHeader) -> dict[str, GgufTensor]:
    """Tensors by Hugging Face names; unknown ones keep their own, to be reported as not part of the model."""
    renamed = {}
    for name, tensor in header.tensors.items():
        module, _, part = name.rpartition(".")
        block = re.fullmatch(r"blk\.(\d{1,6})\.(\w+)", module)
        if block and block[2] in _BLOCK_NAMES:
            module = f"model.layers.{int(block[1])}.{_BLOCK_NAMES[block[2]]}"
        elif name == _ROPE_FACTORS:
            continue  # read by _rope_scaling
        else:
            module = _WHOLE_NAMES.get(module, module)
        renamed[f"{module}.{part}"] = tensor
    return renamed


def _config(
    header: GgufHeader, architecture: Literal["llama", "qwen2"], tensors: Mapping[str, GgufTensor]
) -> ModelConfig:
    def of_model(key: str, kind: type, default: Any = None) -> Any:
        return _get(header, f"{architecture}.{key}", kind, default)

    heads, hidden = of_model("attention.head_count", int), of_model("embedding_length", int)
    if heads <= 0 or of_model("expert_count", int, 0) > 0:
        raise CheckpointError(
            f"{header.path}: {heads} heads and {of_model('expert_count', int, 0)} experts; expected a dense model with heads"
        )
    head_dim = of_model("attention.key_length", int, hidden // heads)
    rotary = of_model("rope.dimension_count", int, head_dim)
    if rotary != head_dim or of_model("attention.value_length", int, head_dim) != head_dim:
        raise CheckpointError(
            f"{header.path}: key length {head_dim}, value length {of_model('attention.value_length', int, head_dim)}, rotary "
            f"dimensions {rotary}; expected all three equal: partial rotary embedding is not supported"
        )
    embedding = tensors.get("model.embed_tokens.weight")
    vocab = embedding.shape[0] if embedding else of_model("vocab_size", int, 0)
    theta = of_model("rope.freq_base", float, 10000.0)
    window = of_model("attention.sliding_window", int, 0)
    max_positions = of_model("context_length", int)
    tokens = [_get(header, f"tokenizer.ggml.{name}_token_id", int, -1) for name in ("bos", "eos", "eot", "eom")]
    bos, *ends = [token if 0 <= token < vocab else None for token in tokens]
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=of_model("feed_forward_length", int),
        layers=of_model("block_count", int),
        heads=heads,
        kv_heads=of_model("attention.head_count_kv", int, heads),
        head_dim=head_dim,
        norm_eps=of_model("attention.layer_norm_rms_epsilon", float, 1e-6),
        rope_theta=theta,
        rope_scaling=_rope_scaling(header, architecture, theta, head_dim),
        max_positions=max_positions,
        sliding_window=window if 0 < window < max_positions else None,
        qkv_bias="model.layers.0.self_attn.q_proj.bias" in tensors,
        o_bias="model.layers.0.self_attn.o_proj.bias" in tensors,
        mlp_bias="model.layers.0.mlp.down_proj.bias" in tensors,
        tied_embeddings="lm_head.weight" not in tensors,
        bos_token_id=bos,
        eos_token_ids=tuple(dict.fromkeys(token for token in ends if token is not None)),
    )


def _get(header: GgufHeader, key: str, kind: type, default: Any = None) -> Any:
    """A metadata value of the given type; CheckpointError when it is missing without default or of another type."""
    value = header.metadata.get(key, default)
    if value is None or isinstance(value, bool) != (kind is bool) or not isinstance(value, kind):
        came = "missing" if value is None else f"{str(value)[:60]!r}"
        raise CheckpointError(f"{header.path}: the metadata {key} is {came}; expected one {kind.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise CheckpointError(f"{header.path}: the metadata {key} is {value}; expected a finite number")
    return value


def _rope_scaling(header: GgufHeader, architecture: str, theta: float, head_dim: int) -> RopeScaling | None:
    kind = _get(header, f"{architecture}.rope.scaling.type", str, "none")
    factors = header.tensors.get(_ROPE_FACTORS)
    if factors is not None:
        return _llama3_scaling(header, factors, theta, head_dim)
    if kind == "none":
        return None
    if kind == "linear":
        return RopeScaling("linear", _get(header, f"{architecture}.rope.scaling.factor", float))
    raise CheckpointError(
        f"{header.path}: rope scaling {kind!r} is not supported; expected none, linear or llama3 factors"
    )


def _llama3_scaling(header: GgufHeader, stored: GgufTensor, theta: float, head_dim: int) -> RopeScaling:
    """The parameters behind Llama 3.1's stored divisors (one per rotary pair), found by recomputing them.

    The largest divisor is the factor; Llama 3.1 to 3.3 share the other three parameters. CheckpointError when the
    divisors do not come out the same, as for LongRoPE.
    """
    if stored.kind != "F32" or stored.shape != (head_dim // 2,):
        raise CheckpointError(
            f"{header.path}: {_ROPE_FACTORS} is {stored.kind} {list(stored.shape)}; expected one F32 a pair"
        )
    divisors = read_tensor(header.path, stored).numpy().astype(np.float64)
    factor = float(divisors.max())
    scaling = RopeScaling("llama3", factor, 1.0, 4.0, 8192)
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = np.clip((scaling.original_max_positions / wavelengths - low) / (high - low), 0.0, 1.0)
    recomputed = 1.0 / ((1.0 - smooth) / factor + smooth) if factor > 0 else np.zeros_like(divisors)
    if not np.allclose(divisors, recomputed, rtol=1e-3):
        raise CheckpointError(
            f"{header.path}: {_ROPE_FACTORS} does not hold Llama 3's scaling; only that one is supported: for LongRoPE and "
            "others there is no equivalent"
        )
    return scaling
