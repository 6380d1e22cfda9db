"""The fixed token ids of a benchmark: a formula, so that a runner in any language feeds the same ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_STRIDE = 7919  # a prime: neighbours in the prompt are no neighbours in the vocabulary


def prompt_ids(vocab_size: int, tokens: int) -> list[int]:
    """Ids ``(7919 i + 1) mod vocab_size`` for i from 0 to ``tokens`` - 1."""
    return [(_STRIDE * i + 1) % vocab_size for i in range(tokens)]


def first_token(model: Mapping[str, Any]) -> int:
    """The id that a generation from an empty cache starts with: the model's own beginning of text, else the prompt's."""
    begin = model.get("bos_token_id")
    return begin if begin is not None else 1 % model["vocab_size"]
