"""``shape:NAME``: published shapes with random weights in place of a checkpoint, for benchmarks and tests.

Weights come from ``seed`` and the tensor's name alone, so that neither order nor the number of layers changes them:
normal with standard deviation K ** -0.5 (bfloat16), norms 1, and for ternary linears -1, 0, 1 with equal chances at the
scale that keeps the same variance.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from qsparse_export.checkpoints.expected import block_linears, check_config, expected_shapes
from qsparse_export.checkpoints.model import Model
from qsparse_export.config import ModelConfig, SparsityRule, TopK
from qsparse_export.errors import UsageError, near_names
from qsparse_export.sparsity import EVERY_PROJECTION
from qsparse_export.weights import TernaryWeight

if TYPE_CHECKING:
    import torch

PREFIX = "shape:"
# The paper trains with "top-k 70 %": 30 % of every projection's inputs are zero, and the squared ReLU adds its own
# zeros before down_proj, for 40 % over all.
_PAPER_SPARSITY = (SparsityRule(EVERY_PROJECTION, TopK(0.3)),)


def _paper(hidden: int, inner: int, layers: int, heads: int) -> ModelConfig:
    """A Q-Sparse model trained from scratch (arXiv 2407.10969): Llama's architecture with squared-ReLU GLU."""
    return ModelConfig(
        architecture="llama",
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=inner,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        activation="relu2",
        max_positions=2048,
        sparsity=_PAPER_SPARSITY,
        bos_token_id=1,
        eos_token_ids=(2,),
    )


_PAPER_SHAPES = {
    "300m": _paper(1024, 2730, 24, 16),
    "700m": _paper(1536, 4096, 24, 24),
    "1.3b": _paper(2048, 5460, 24, 32),
    "7b": _paper(4096, 11008, 32, 32),
}
_BITNET_2B_4T = ModelConfig(
    architecture="bitnet",
    vocab_size=128256,
    hidden_size=2560,
    intermediate_size=6912,
    layers=30,
    heads=20,
    kv_heads=5,
    head_dim=128,
    activation="relu2",
    rope_theta=500000.0,
    max_positions=4096,
    sub_norms=True,
    tied_embeddings=True,
    quantization="bitnet",
    bos_token_id=128000,
    eos_token_ids=(128001, 128009),
)
SHAPES: Mapping[str, ModelConfig] = {
    "bitnet-2b-4t": _BITNET_2B_4T,
    **{f"qsparse-{size}": config for size, config in _PAPER_SHAPES.items()},
    **{f"bitnet-qsparse-{size}": replace(config, quantization="bitnet") for size, config in _PAPER_SHAPES.items()},
}


@dataclass(frozen=True)
class RandomWeights:
    """A WeightSource that makes each tensor when it is read."""

    config: ModelConfig
    seed: int

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name to shape."""
        return expected_shapes(self.config)

    def read(self, name: str) -> torch.Tensor | TernaryWeight:
        """bfloat16, or TernaryWeight for the linears of the blocks when the model is quantised."""
        import torch

        shape = self.shapes[name]
        if len(shape) == 1:
            value = 0.0 if name.endswith(".bias") else 1.0
            return torch.full(shape, value, dtype=torch.bfloat16)
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        if self.config.quantization == "bitnet" and name.removesuffix(".weight") in block_linears(self.config):
            values = torch.randint(-1, 2, shape, dtype=torch.int8, generator=generator)
            return TernaryWeight(values, math.sqrt(1.5 / shape[1]))
        return torch.randn(shape, dtype=torch.bfloat16, generator=generator).mul_(shape[1] ** -0.5)


def read_shape(text: str, seed: int) -> Model:
    """The model that ``shape:NAME[,layers=N]`` names; UsageError for unknown names and options."""
    name, *options = text.removeprefix(PREFIX).split(",")
    if name not in SHAPES:
        raise UsageError(f"no shape is called {name!r}; {near_names(name, SHAPES)}")
    config = SHAPES[name]
    for option in options:
        key, _, value = option.partition("=")
        if key != "layers" or not value.isascii() or not value.isdigit() or not 0 < int(value[:9]) <= 4096:
            raise UsageError(f"{text!r}: {option!r} is not understood; expected layers=N with N from 1 to 4096")
        config = replace(config, layers=int(value))
    if not 0 <= seed < 2**63:
        raise UsageError(f"the seed is {seed}; expected 0 to 2**63 - 1")
    check_config(config, text)
    suffix = f"-{config.layers}l" if config.layers != SHAPES[name].layers else ""
    return Model(
        name=f"{name}{suffix}",
        config=config,
        weights=RandomWeights(config, seed),
        tokenizer=None,
        source_format="shape",
        source=f"{PREFIX}{name},layers={config.layers} seed={seed}",
    )
