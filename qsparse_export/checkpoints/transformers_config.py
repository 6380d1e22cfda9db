"""A transformers ``config.json`` (Llama, Mistral, Qwen2, BitNet; version 4 and 5 spellings) to a ModelConfig.

Defaults of absent keys are those of transformers' configuration classes. Anything that would change what the model
computes and is not understood is refused, never ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from qsparse_export.checkpoints.bitnet import Storage
from qsparse_export.checkpoints.expected import check_config
from qsparse_export.config import ModelConfig, RopeScaling, SparsityRule, TopK
from qsparse_export.errors import CheckpointError, near_names
from qsparse_export.sparsity import EVERY_PROJECTION, rules_of_mapping

Architecture = Literal["llama", "mistral", "qwen2", "bitnet"]


@dataclass(frozen=True)
class _Defaults:
    """What transformers assumes for an absent key, per model_type."""

    architecture: Architecture
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_positions: int = 2048
    kv_heads: int | None = None
    sliding_window: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2


_MODEL_TYPES: Mapping[str, _Defaults] = {
    "llama": _Defaults("llama"),
    "mistral": _Defaults("mistral", max_positions=131072, kv_heads=8, sliding_window=4096),
    "qwen2": _Defaults("qwen2", max_positions=32768, sliding_window=4096, bos_token_id=None, eos_token_id=None),
    "bitnet": _Defaults(
        "bitnet", norm_eps=1e-5, rope_theta=500000.0, kv_heads=5, bos_token_id=128000, eos_token_id=128001
    ),
}
_ACTIVATIONS: Mapping[str, Literal["silu", "relu2"]] = {"silu": "silu", "swish": "silu", "relu2": "relu2"}
_HEADS_ALONE = ("lm_head", "lm_head.weight")


@dataclass(frozen=True)
class FolderConfig:
    """The model, and how its block linears are stored."""

    model: ModelConfig
    storage: Storage


def read_config(plain: Mapping[str, Any], generation: Mapping[str, Any], source: str) -> FolderConfig:
    """``plain`` is config.json, ``generation`` generation_config.json (empty when absent), ``source`` begins errors."""
    model_type = plain.get("model_type")
    if not isinstance(model_type, str) or model_type not in _MODEL_TYPES:
        raise CheckpointError(
            f"{source}: model_type is {model_type!r}, an architecture that is not supported; "
            f"{near_names(str(model_type), _MODEL_TYPES)}"
        )
    default = _MODEL_TYPES[model_type]
    get = _Getter(plain, source)
    hidden, heads = get.integer("hidden_size"), get.integer("num_attention_heads")
    vocab, layers = get.integer("vocab_size"), get.integer("num_hidden_layers")
    max_positions = get.integer("max_position_embeddings", default.max_positions)
    head_dim = get.optional_integer("head_dim")
    if head_dim is None:
        if heads <= 0 or hidden % heads:
            raise CheckpointError(
                f"{source}: hidden_size {hidden} does not divide into {heads} heads; expected a head_dim, or a hidden_size "
                "that is a multiple of num_attention_heads"
            )
        head_dim = hidden // heads
    if model_type == "bitnet" and heads * head_dim != hidden:
        raise CheckpointError(
            f"{source}: {heads} heads of {head_dim} are {heads * head_dim} channels and hidden_size is {hidden}; BitNet's "
            "attn_sub_norm needs them equal"
        )
    attention_bias = get.boolean("attention_bias", False) if model_type in ("llama", "bitnet") else False
    storage, linear_norm, linear_norm_eps = _quantization(get)
    theta, scaling = _rope(get, default.rope_theta, max_positions)
    model = ModelConfig(
        architecture=default.architecture,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=get.integer("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=get.optional_integer("num_key_value_heads", default.kv_heads) or heads,
        head_dim=head_dim,
        activation=_activation(get, "relu2" if model_type == "bitnet" else "silu"),
        norm_eps=get.number("rms_norm_eps", default.norm_eps),
        rope_theta=theta,
        rope_scaling=scaling,
        max_positions=max_positions,
        sliding_window=_sliding_window(get, model_type, default.sliding_window, layers, max_positions),
        qkv_bias=model_type == "qwen2" or attention_bias,
        o_bias=attention_bias,
        mlp_bias=get.boolean("mlp_bias", False) if model_type == "llama" else False,
        sub_norms=model_type == "bitnet",
        linear_norm=linear_norm,
        linear_norm_eps=linear_norm_eps,
        tied_embeddings=get.boolean("tie_word_embeddings", False),
        quantization="none" if storage is None else "bitnet",
        sparsity=_sparsity(get),
        bos_token_id=next(iter(_tokens(get, "bos_token_id", default.bos_token_id, vocab)), None),
        eos_token_ids=_merged(
            _tokens(get, "eos_token_id", default.eos_token_id, vocab),
            _tokens(_Getter(generation, f"{source} (generation_config.json)"), "eos_token_id", None, vocab),
        ),
    )
    check_config(model, source)
    return FolderConfig(model, storage or "float")


@dataclass(frozen=True)
class _Getter:
    """Typed access to JSON values; CheckpointError that names the key otherwise. JSON null counts as absent."""

    plain: Mapping[str, Any]
    source: str

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.optional_integer(key, default)
        if value is None:
            raise CheckpointError(f"{self.source}: {key} is missing; expected a positive integer")
        return value

    def optional_integer(self, key: str, default: int | None = None) -> int | None:
        value = self.plain.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            self.fail(key, value, "an integer")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.plain.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not -1e300 < value < 1e300:
            self.fail(key, value, "a finite number")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.plain.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.fail(key, value, "true or false")
        return value

    def mapping(self, key: str) -> Mapping[str, Any] | None:
        value = self.plain.get(key)
        if value is not None and not isinstance(value, dict):
            self.fail(key, value, "an object")
        return value

    def fail(self, key: str, value: object, expected: str) -> None:
        raise CheckpointError(f"{self.source}: {key} is {str(value)[:80]!r}; expected {expected}")


def _activation(get: _Getter, default: str) -> Literal["silu", "relu2"]:
    name = get.plain.get("hidden_act") or default
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        get.fail("hidden_act", name, f"one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _rope(get: _Getter, default_theta: float, max_positions: int) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from version 4's rope_theta and rope_scaling or version 5's rope_parameters."""
    parameters = get.mapping("rope_scaling") or get.mapping("rope_parameters") or {}
    if any(isinstance(value, dict) for value in parameters.values()):
        get.fail("rope_parameters", parameters, "one set of values for all layers")
    rope = _Getter(parameters, f"{get.source}: rope_parameters")
    theta = rope.number("rope_theta", get.number("rope_theta", default_theta))
    for partial in (rope.number("partial_rotary_factor", 1.0), get.number("partial_rotary_factor", 1.0)):
        if partial != 1.0:
            get.fail("partial_rotary_factor", partial, "1: only full rotary embedding is supported")
    kind = parameters.get("rope_type", parameters.get("type")) or "default"
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", _required(rope, "factor"))
    if kind == "llama3":
        original = get.integer(
            "original_max_position_embeddings", rope.integer("original_max_position_embeddings", max_positions)
        )
        low, high = _required(rope, "low_freq_factor"), _required(rope, "high_freq_factor")
        return theta, RopeScaling("llama3", _required(rope, "factor"), low, high, original)
    rope.fail("rope_type", kind, "default, linear or llama3: no other scaling is supported")
    raise AssertionError("unreachable: fail raises")


def _required(get: _Getter, key: str) -> float:
    value = get.number(key, math.nan)
    if math.isnan(value):
        get.fail(key, None, "a positive number")
    return value


def _sliding_window(get: _Getter, model_type: str, default: int | None, layers: int, max_positions: int) -> int | None:
    """Tokens that each layer sees; None without a limit. CheckpointError when layers differ."""
    if model_type not in ("mistral", "qwen2"):
        return None
    # An explicit null means no window; only an absent key takes the default.
    window = get.optional_integer("sliding_window") if "sliding_window" in get.plain else default
    if model_type == "qwen2" and not get.boolean("use_sliding_window", False):
        return None
    if window is None or window >= max_positions:
        return None
    kinds = get.plain.get("layer_types")
    if kinds is None and model_type == "qwen2":
        first = get.integer("max_window_layers", 28)
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(min(layers, first + 1))]
    if kinds is None:
        return window
    different = set(kinds) if isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds) else {"?"}
    if different == {"full_attention"}:
        return None
    if different != {"sliding_attention"}:
        get.fail("layer_types", sorted(different), "one kind of attention, sliding or full, in all layers")
    return window


def _quantization(get: _Getter) -> tuple[Storage | None, bool, float]:
    """(storage or None without quantisation, use_rms_norm, its eps) from the quantization_config."""
    plain = get.mapping("quantization_config")
    if plain is None:
        return None, False, 1e-6
    inner = _Getter(plain, f"{get.source}: quantization_config")
    if plain.get("quant_method") != "bitnet":
        inner.fail("quant_method", plain.get("quant_method"), "'bitnet': save the model dequantised to use it here")
    skipped = plain.get("modules_to_not_convert")
    if skipped is not None and (
        not isinstance(skipped, list)
        or not any(name in _HEADS_ALONE for name in skipped)
        or not all(isinstance(name, str) and name in (*_HEADS_ALONE, "model.embed_tokens") for name in skipped)
    ):
        inner.fail("modules_to_not_convert", skipped, "['lm_head']: every linear of the blocks ternary, the head not")
    linear_class = plain.get("linear_class", "bitlinear")
    mode = plain.get("quantization_mode", "offline")
    storages: Mapping[tuple[Any, Any], Storage] = {
        ("autobitlinear", "offline"): "multiply",
        ("autobitlinear", "online"): "float",
        ("bitlinear", "offline"): "divide",
        ("bitlinear", "online"): "divide",  # transformers' BitLinear takes no notice of the mode
    }
    if not isinstance(linear_class, str) or not isinstance(mode, str) or (linear_class, mode) not in storages:
        inner.fail("linear_class and quantization_mode", (linear_class, mode), f"one of {sorted(storages)}")
    return storages[linear_class, mode], inner.boolean("use_rms_norm", False), inner.number("rms_norm_eps", 1e-6)


def _sparsity(get: _Getter) -> tuple[SparsityRule, ...]:
    """The official code's global ``sparse_ratio`` over the linears of all blocks, or one ratio per projection."""
    value = get.plain.get("sparse_ratio")
    if value is None:
        return ()
    if isinstance(value, dict):
        return rules_of_mapping(value, f"{get.source}: sparse_ratio")
    ratio = get.number("sparse_ratio", 0.0)
    if ratio > 1.0:
        get.fail("sparse_ratio", ratio, "a share of zeros, at most 1, so that k stays within 0..width")
    return (SparsityRule(EVERY_PROJECTION, TopK(ratio)),) if ratio > 0.0 else ()


def _tokens(get: _Getter, key: str, default: int | None, vocab: int) -> tuple[int, ...]:
    """Token ids under ``key``, one or a list; those outside the vocabulary can never be generated and are dropped."""
    value = get.plain.get(key, default)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int):
            get.fail(key, value, "a token id or a list of them")
    return tuple(token for token in ids if 0 <= token < vocab)


def _merged(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(dict.fromkeys((*first, *second)))
