"""The tensors that a configuration implies, and the comparison with those that a checkpoint holds (no data is read)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from qsparse_export.config import ModelConfig, RopeScaling
from qsparse_export.errors import CheckpointError, near_names

# No published model comes near these; a configuration beyond them is damaged or hostile, and listing its tensors
# would already exhaust the memory.
_MOST: Mapping[str, int] = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "layers": 4096,
    "heads": 1 << 16,
    "kv_heads": 1 << 16,
    "head_dim": 1 << 16,
    "max_positions": 1 << 31,
}
_MOST_EXPERTS = 4096
_MOST_RULES = 1 << 16
_NAMED_IN_ERRORS = 3


def check_config(config: ModelConfig, source: str) -> None:
    """Raises CheckpointError, beginning with ``source``, for a value of the wrong type or beyond any real model."""

    def fail(field: str, value: object, expected: str) -> None:
        raise CheckpointError(f"{source}: {field} is {value!r}; expected {expected}")

    for field, most in _MOST.items():
        value = getattr(config, field)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
            fail(field, value, f"an integer from 1 to {most}")
    for field, value in (("norm_eps", config.norm_eps), ("rope_theta", config.rope_theta)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            fail(field, value, "a finite number that is not negative")
    if config.rope_theta <= 0:
        fail("rope_theta", config.rope_theta, "a positive number")
    for field in ("qkv_bias", "o_bias", "mlp_bias", "sub_norms", "linear_norm", "tied_embeddings"):
        if not isinstance(getattr(config, field), bool):
            fail(field, getattr(config, field), "true or false")
    window = config.sliding_window
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window <= 0):
        fail("sliding_window", window, "a positive number of tokens, or none")
    tokens = config.eos_token_ids if config.bos_token_id is None else (*config.eos_token_ids, config.bos_token_id)
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < config.vocab_size:
            fail("a bos or eos token id", token, f"an integer from 0 to {config.vocab_size - 1}")
    if config.architecture not in ("llama", "mistral", "qwen2", "bitnet"):
        fail("architecture", config.architecture, "llama, mistral, qwen2 or bitnet")
    if config.rope_scaling is not None:
        _check_rope_scaling(config.rope_scaling, source)
    if config.moe is not None:
        for field, value in (("experts", config.moe.experts), ("experts_per_token", config.moe.experts_per_token)):
            if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _MOST_EXPERTS:
                fail(field, value, f"an integer from 1 to {_MOST_EXPERTS}")
        if config.moe.experts * config.layers > _MOST_RULES:
            fail("experts x layers", config.moe.experts * config.layers, f"at most {_MOST_RULES}")
    if len(config.sparsity) > _MOST_RULES or not all(isinstance(rule.pattern, str) for rule in config.sparsity):
        fail("sparsity", f"{len(config.sparsity)} rules", f"at most {_MOST_RULES} rules with text patterns")


def _check_rope_scaling(scaling: RopeScaling, source: str) -> None:
    numbers = (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_positions)
    for value in numbers:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise CheckpointError(f"{source}: rope scaling holds {value!r}; expected positive finite numbers")
    if scaling.kind not in ("linear", "llama3"):
        raise CheckpointError(f"{source}: rope scaling is {scaling.kind!r}; expected 'linear' or 'llama3'")
    if scaling.kind == "llama3" and scaling.high_freq_factor <= scaling.low_freq_factor:
        raise CheckpointError(
            f"{source}: rope scaling has high_freq_factor {scaling.high_freq_factor} and low_freq_factor "
            f"{scaling.low_freq_factor}; expected the high one to be larger"
        )


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name to shape of every tensor of the decoder, Hugging Face names, linears [N, K], without building a module.

    A tied head has no tensor of its own. Norms are [width]; biases [N]; the router of a mixture is ``mlp.gate``.
    """
    hidden, heads_width = config.hidden_size, config.heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.layers):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        for name, (n, k) in _layer_linears(config).items():
            shapes[f"{prefix}.{name}.weight"] = (n, k)
            if _has_bias(config, name):
                shapes[f"{prefix}.{name}.bias"] = (n,)
            if config.linear_norm and config.quantization == "bitnet":
                shapes[f"{prefix}.{name}.rms_norm.weight"] = (k,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        if config.moe is not None:
            shapes[f"{prefix}.mlp.gate.weight"] = (config.moe.experts, hidden)
        if config.sub_norms:
            shapes[f"{prefix}.self_attn.attn_sub_norm.weight"] = (heads_width,)
            for block in _feed_forwards(config):
                shapes[f"{prefix}.{block}.ffn_sub_norm.weight"] = (config.intermediate_size,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tied_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def block_linears(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Module name to (N, K) of every linear inside the blocks: those that a sparsity rule may reach."""
    layer = _layer_linears(config)
    return {f"model.layers.{i}.{name}": shape for i in range(config.layers) for name, shape in layer.items()}


def _feed_forwards(config: ModelConfig) -> list[str]:
    return ["mlp"] if config.moe is None else [f"mlp.experts.{i}" for i in range(config.moe.experts)]


def _layer_linears(config: ModelConfig) -> dict[str, tuple[int, int]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    linears = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
    }
    for block in _feed_forwards(config):
        linears[f"{block}.gate_proj"] = (inner, hidden)
        linears[f"{block}.up_proj"] = (inner, hidden)
        linears[f"{block}.down_proj"] = (hidden, inner)
    return linears


def _has_bias(config: ModelConfig, linear: str) -> bool:
    if linear.startswith("mlp"):
        return config.mlp_bias
    return config.o_bias if linear.endswith("o_proj") else config.qkv_bias


def check_tensors(found: Mapping[str, tuple[int, ...]], config: ModelConfig, source: str) -> None:
    """Raises CheckpointError naming missing, extra and misshapen tensors; compares headers only."""
    expected = expected_shapes(config)
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    if missing:
        hint = near_names(missing[0], extra) if extra else "the file is incomplete, or its config is another model's"
        raise CheckpointError(
            f"{source}: {_listed(missing)} missing of the {len(expected)} tensors that the config implies "
            f"({_brief(config)}); {hint}"
        )
    if extra:
        raise CheckpointError(
            f"{source}: {_listed(extra)} not part of the model that the config describes ({_brief(config)}), and "
            "leaving tensors out would compute something else: correct the config or remove them"
        )
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise CheckpointError(
                f"{source}: {name} has the shape {list(found[name])}, and the config ({_brief(config)}) implies "
                f"{list(shape)}: the config and the weights belong to different models"
            )


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    shown = ", ".join(names[:_NAMED_IN_ERRORS])
    rest = len(names) - _NAMED_IN_ERRORS
    return f"{shown} and {rest} more are" if rest > 0 else f"{shown} {'is' if len(names) == 1 else 'are'}"


def _brief(config: ModelConfig) -> str:
    return (
        f"{config.architecture}, {config.layers} layers, hidden {config.hidden_size}, feed-forward "
        f"{config.intermediate_size}, {config.heads}/{config.kv_heads} heads of {config.head_dim}, "
        f"vocabulary {config.vocab_size}"
    )
