"""Everything model-shaped, as frozen values: shapes, activation, quantisation, and the sparsity of every projection."""

from __future__ import annotations

import fnmatch
from dataclasses import asdict, dataclass
from typing import Any, Literal

from qsparse_export.errors import CheckpointError

Rescale = Literal["none", "l2"]


@dataclass(frozen=True)
class TopK:
    """One top-k mask over the last dimension of an activation.

    ``sparse_ratio`` is the share of zeros (<= 0 means dense), ``block`` the number of consecutive channels that compete
    (0: the whole row), ``rescale`` whether the masked row is divided by its L2 norm.
    """

    sparse_ratio: float = 0.0
    block: int = 0
    rescale: Rescale = "none"

    def __post_init__(self) -> None:
        if not self.sparse_ratio <= 1.0:  # also refuses NaN
            raise CheckpointError(f"sparse_ratio is {self.sparse_ratio}; expected a share of zeros, at most 1.0")
        if self.block < 0:
            raise CheckpointError(f"block is {self.block}; expected 0 (whole row) or a positive number of channels")
        if self.rescale not in ("none", "l2"):
            raise CheckpointError(f"rescale is {self.rescale!r}; expected 'none' or 'l2'")

    @property
    def is_dense(self) -> bool:
        """No mask at all: nothing is dropped and nothing is rescaled."""
        return self.sparse_ratio <= 0.0 and self.rescale == "none"

    def k(self, dim: int) -> int:
        """Channels kept per row (per block when ``block`` is set), as the official code counts: int((1 - ratio) * dim).

        The floating-point product is truncated, so ``TopK(0.9).k(10) == 0``; this is reproduced bit for bit.
        """
        width = self.block or dim
        return width if self.sparse_ratio <= 0.0 else int((1 - self.sparse_ratio) * width)


@dataclass(frozen=True)
class SparsityRule:
    """``topk`` applies to every linear whose full module name matches the ``fnmatch`` pattern."""

    pattern: str
    topk: TopK


def topk_of(rules: tuple[SparsityRule, ...], name: str) -> TopK:
    """The mask at the input of the linear called ``name``; the last matching rule wins, none means dense."""
    for rule in reversed(rules):
        if fnmatch.fnmatchcase(name, rule.pattern):
            return rule.topk
    return TopK()


@dataclass(frozen=True)
class RopeScaling:
    """Rotary frequency scaling: ``linear`` divides by ``factor``; ``llama3`` is the piecewise rule of Llama 3.1."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True)
class MoE:
    """Token-choice mixture of experts: ``experts_per_token`` of ``experts`` feed-forward blocks run for each token."""

    experts: int
    experts_per_token: int
    normalize: bool = True


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. Widths are channels, ``rope_theta`` the rotary base, ``norm_eps`` inside the RMS root."""

    architecture: Literal["llama", "mistral", "qwen2", "bitnet"]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    activation: Literal["silu", "relu2"] = "silu"
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_positions: int = 2048
    sliding_window: int | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    sub_norms: bool = False
    linear_norm: bool = False
    linear_norm_eps: float = 1e-6
    tied_embeddings: bool = False
    quantization: Literal["none", "bitnet"] = "none"
    sparsity: tuple[SparsityRule, ...] = ()
    moe: MoE | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field in ("vocab_size", "hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "head_dim"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise CheckpointError(f"config: {field} is {value!r}; expected a positive integer")
        if self.heads % self.kv_heads:
            raise CheckpointError(f"config: {self.heads} heads cannot share {self.kv_heads} KV heads evenly")
        if self.head_dim % 2:
            raise CheckpointError(f"config: head_dim is {self.head_dim}; rotary embedding needs an even number")
        if self.activation not in ("silu", "relu2"):
            raise CheckpointError(f"config: activation is {self.activation!r}; expected 'silu' or 'relu2'")
        if self.quantization not in ("none", "bitnet"):
            raise CheckpointError(f"config: quantization is {self.quantization!r}; expected 'none' or 'bitnet'")
        if self.moe and not 0 < self.moe.experts_per_token <= self.moe.experts:
            raise CheckpointError(f"config: {self.moe.experts_per_token} of {self.moe.experts} experts per token")

    def to_dict(self) -> dict[str, Any]:
        """A plain dict of str, int, float, bool, list and None: safe in JSON and in ``weights_only`` pickles."""
        plain = asdict(self)
        plain["sparsity"] = [{"pattern": r.pattern, **asdict(r.topk)} for r in self.sparsity]
        plain["eos_token_ids"] = list(self.eos_token_ids)
        return plain

    @staticmethod
    def from_dict(plain: dict[str, Any]) -> ModelConfig:
        """Inverse of :meth:`to_dict`; raises CheckpointError naming unknown or missing fields."""
        fields = dict(plain)
        try:
            fields["sparsity"] = tuple(
                SparsityRule(r["pattern"], TopK(float(r["sparse_ratio"]), int(r["block"]), r["rescale"]))
                for r in fields.get("sparsity", ())
            )
            fields["eos_token_ids"] = tuple(fields.get("eos_token_ids", ()))
            if fields.get("rope_scaling"):
                fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
            if fields.get("moe"):
                fields["moe"] = MoE(**fields["moe"])
            return ModelConfig(**fields)
        except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
            raise CheckpointError(f"config does not describe a model: {error}") from error
