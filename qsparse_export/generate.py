"""Greedy text generation and perplexity over a compiled decoder, with the KV cache kept inside the runtime."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from qsparse_export.errors import BundleError, UsageError
from qsparse_export.runtimes.base import subtract_calls

if TYPE_CHECKING:
    from pathlib import Path

    from qsparse_export.config import ModelConfig
    from qsparse_export.runtimes.base import NativeCalls, Session


CACHE_TOKENS = 64
"""A shared cache has room for a multiple of that many tokens."""


@dataclass(frozen=True)
class Generation:
    """What :meth:`Generator.generate` produced: token ids, speeds in tokens per second, native kernel calls."""

    tokens: tuple[int, ...]
    prompt_tokens: tuple[int, ...]
    native_calls: NativeCalls
    prefill_tokens_per_s: float
    decode_tokens_per_s: float


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log likelihood (natural) of ``tokens`` predicted tokens."""

    perplexity: float
    tokens: int


@dataclass(frozen=True)
class DecoderShape:
    """What the loop must know of a decoder: cache [1, kv_heads, P, head_dim] of ``dtype`` (a NumPy name), and limits."""

    vocab_size: int
    kv_heads: int
    head_dim: int
    max_positions: int
    eos_token_ids: tuple[int, ...]
    dtype: str

    @staticmethod
    def of(config: ModelConfig, dtype: str) -> DecoderShape:
        """The shape of a model with this ``config``."""
        return DecoderShape(
            config.vocab_size, config.kv_heads, config.head_dim, config.max_positions, config.eos_token_ids, dtype
        )


class Generator:
    """An open decoder. ``tokenizer`` is the path of its tokenizer.json. Not safe for use from several threads at once."""

    def __init__(self, session: Session, shape: DecoderShape, tokenizer: Path | None = None) -> None:
        self.shape = shape
        self._session = session
        self._shares_cache = session.shares_cache
        self._tokenizer_file = tokenizer
        self._pasts = tuple(name for name in session.input_names if name.startswith("past_key_values."))
        self._presents = tuple(name.replace("past_key_values.", "present.") for name in self._pasts)

    def steps(self, ids: Sequence[int] | np.ndarray) -> Iterator[tuple[np.ndarray, Callable[[int], None]]]:
        """Yields float32 logits [S, vocab] (S: prompt, then 1; or 1 each time) and a function that takes the next token id.

        The caller chooses the token, so that greedy decoding, sampling and verification share one loop; the iteration
        ends when no token was given.
        """
        chosen: list[int] = []
        feed = self._checked(ids)
        past = self._cache({}, 0, 0)
        position = room = 0
        while len(feed):
            if self._shares_cache and position + len(feed) > room:
                # By half each time, so that copying a growing cache stays a small share of filling it.
                room = min(
                    max(self.shape.max_positions, position + len(feed)), _rounded((position + len(feed)) * 3 // 2)
                )
                past = self._cache(past, position, room)
            logits, past = self._forward(feed, past, position)
            position += len(feed)
            chosen.clear()
            yield logits, chosen.append
            feed = np.array(chosen[-1:], np.int64)

    def logits(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """float32 logits [S, vocab] of all positions of one sequence; BundleError where the model was exported without."""
        logits, _ = next(self.steps(ids))
        if len(logits) != len(ids):
            raise BundleError(
                "the model gives logits of the last position alone, and all are needed: export it with --logits all"
            )
        return logits

    def generate(
        self,
        ids: Sequence[int],
        max_new_tokens: int = 64,
        on_token: Callable[[int], object] | None = None,
        stop_at_eos: bool = True,
    ) -> Generation:
        """Greedy decoding of up to ``max_new_tokens``; ``on_token`` sees each token as it comes.

        Raises UsageError for an empty prompt, ids outside the vocabulary, or a sequence beyond the model's positions.
        """
        if len(ids) + max_new_tokens > self.shape.max_positions:
            raise UsageError(
                f"{len(ids)} prompt tokens and {max_new_tokens} new ones exceed the model's {self.shape.max_positions} positions"
            )
        before = self._session.native_calls()
        tokens: list[int] = []
        start = time.perf_counter()
        first = start
        for logits, choose in self.steps(ids):
            if not tokens:
                first = time.perf_counter()
            if max_new_tokens > 0:
                tokens.append(greedy(logits[-1]))
                if on_token:
                    on_token(tokens[-1])
                if len(tokens) < max_new_tokens and not (stop_at_eos and tokens[-1] in self.shape.eos_token_ids):
                    choose(tokens[-1])
        decode_s = time.perf_counter() - first
        return Generation(
            tokens=tuple(tokens),
            prompt_tokens=tuple(int(i) for i in ids),
            native_calls=subtract_calls(self._session.native_calls(), before),
            prefill_tokens_per_s=len(ids) / (first - start),
            # The first token comes out of the prefill, so one decode step fewer than tokens was timed.
            decode_tokens_per_s=(len(tokens) - 1) / decode_s if len(tokens) > 1 else 0.0,
        )

    def perplexity(
        self, ids: Sequence[int], window: int = 512, on_window: Callable[[int], object] | None = None
    ) -> Perplexity:
        """Perplexity over consecutive windows of ``window`` tokens, each starting from an empty cache.

        Every token of a window but its first is predicted; a last window of one token is left out.
        """
        window = min(window, self.shape.max_positions)
        if window < 2 or len(ids) < 2:
            raise UsageError(
                f"perplexity needs at least 2 tokens and windows of 2; got {len(ids)} in windows of {window}"
            )
        total, count = 0.0, 0
        for start in range(0, len(ids) - 1, window):
            part = np.asarray(ids[start : start + window], np.int64)
            total += negative_log_likelihood(self.logits(part), part)
            count += len(part) - 1
            if on_window:
                on_window(len(part))
        return Perplexity(float(np.exp(total / count)), count)

    def native_calls(self) -> NativeCalls:
        """Native kernel calls since the model was opened."""
        return self._session.native_calls()

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text`` by the bundle's tokenizer; BundleError when it has none."""
        return self._tokenizer.encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids by the bundle's tokenizer."""
        return self._tokenizer.decode(list(ids))

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        if self._tokenizer_file is None or not self._tokenizer_file.is_file():
            raise BundleError(
                f"there is no tokenizer ({self._tokenizer_file}), since the checkpoint had none: "
                "put a tokenizer.json into the checkpoint folder and export again, or pass token ids"
            )
        return Tokenizer.from_file(str(self._tokenizer_file))

    def _checked(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        array = np.asarray(ids, np.int64)
        if array.ndim != 1 or not array.size:
            raise UsageError(f"the prompt is {array.size} token ids; expected at least one")
        if array.min() < 0 or array.max() >= self.shape.vocab_size:
            raise UsageError(
                f"token ids from {array.min()} to {array.max()}; the vocabulary has {self.shape.vocab_size}"
            )
        return array

    def _cache(self, past: dict[str, Any], filled: int, room: int) -> dict[str, Any]:
        """Caches with ``room`` for so many tokens, the first ``filled`` those of ``past``."""

        def larger(name: str) -> Any:
            cache = np.zeros((1, self.shape.kv_heads, room, self.shape.head_dim), np.dtype(self.shape.dtype))
            if filled:
                cache[:, :, :filled] = self._session.to_numpy(past[name])[:, :, :filled]
            return self._session.to_tensor(cache) if room else cache

        return {name: larger(name) for name in self._pasts}

    def _forward(self, ids: np.ndarray, past: dict[str, Any], position: int) -> tuple[np.ndarray, dict[str, Any]]:
        length = position + len(ids)
        feeds = {
            "input_ids": ids[None],
            "attention_mask": np.ones((1, length), np.int64),
            "position_ids": np.arange(position, length, dtype=np.int64)[None],
        }
        feeds = {name: feeds[name] for name in feeds if name in self._session.input_names} | past
        if self._shares_cache:
            written = [past[name] for name in self._pasts]
            outputs = self._session.run(feeds, dict(zip(self._presents, written, strict=True)))
        else:
            outputs = self._session.run(feeds)
            past = dict(zip(self._pasts, [outputs[present] for present in self._presents], strict=True))
        return np.asarray(self._session.to_numpy(outputs["logits"])[0], np.float32), past


def _rounded(tokens: int) -> int:
    return -(-tokens // CACHE_TOKENS) * CACHE_TOKENS


def greedy(logits: np.ndarray) -> int:
    """Index of the largest of ``logits`` [vocab], the lowest on ties; BundleError when any is NaN."""
    largest = int(np.argmax(logits))  # of a NaN, where there is one
    if np.isnan(logits[largest]):
        raise BundleError("the model computed NaN logits; the weights or the input overflow its number format")
    return largest


def negative_log_likelihood(logits: np.ndarray, ids: np.ndarray) -> float:
    """Sum over positions 1.. of -log softmax(logits[i-1])[ids[i]], in float64; logits [S, vocab], ids [S]."""
    rows = logits[:-1].astype(np.float64)
    peak = rows.max(axis=-1, keepdims=True)
    log_total = np.log(np.exp(rows - peak).sum(axis=-1)) + peak[:, 0]
    return float((log_total - rows[np.arange(len(rows)), ids[1:]]).sum())
