"""CachedAttention: cases and their truth in NumPy, float64."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from error_share import error_share
from kernel_call import ELEMENT_TYPES, Call, unwritten

LEAST_CASES = 30
MASKS = ("causal", "window", "left padding", "random")


class Args(ctypes.Structure):
    """qsk_cached_attention_args."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("qkv", ctypes.c_void_p),
        ("cosine", ctypes.c_void_p),
        ("sine", ctypes.c_void_p),
        ("visible", ctypes.c_void_p),
        ("past_key", ctypes.c_void_p),
        ("past_value", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("present_key", ctypes.c_void_p),
        ("present_value", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("total", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("past_capacity", ctypes.c_int64),
    )


def mask_of(rng: np.random.Generator, batch: int, tokens: int, total: int, kind: str) -> np.ndarray:
    """bool [batch, tokens, total]; every query sees itself."""
    slots, queries = np.arange(total), np.arange(total - tokens, total)[:, None]
    visible = np.broadcast_to(slots <= queries, (batch, tokens, total)).copy()
    if kind == "window":
        visible &= slots > queries - 5
    elif kind == "left padding":
        visible &= slots >= rng.integers(0, total, (batch, 1, 1))
    elif kind == "random":
        visible &= rng.random(visible.shape) < 0.7
    return visible | (slots == queries)


@dataclass(frozen=True)
class CachedAttention:
    """``x`` is qkv [batch, tokens, (heads + 2 kv_heads) * width]; ``angles`` [batch, tokens, width / 2]."""

    x: np.ndarray
    angles: np.ndarray
    visible: np.ndarray
    past_key: np.ndarray
    past_value: np.ndarray
    heads: int
    workers: int = 1

    def call(self) -> Call:
        batch, kv_heads, capacity, width = self.past_key.shape
        tokens, total, dtype = self.x.shape[1], self.visible.shape[-1], self.x.dtype
        sizes = {"batch": batch, "tokens": tokens, "total": total, "heads": self.heads, "kv_heads": kv_heads}
        args = Args(type=ELEMENT_TYPES[dtype], width=width, past_capacity=capacity, **sizes)
        cache = (batch, kv_heads, max(capacity, total), width)
        return Call(
            "qsk_cached_attention",
            args,
            {
                "qkv": self.x,
                "cosine": np.cos(self.angles).astype(dtype),
                "sine": np.sin(self.angles).astype(dtype),
                "visible": self.visible,
                "past_key": self.past_key,
                "past_value": self.past_value,
            },
            {
                "y": unwritten((batch, tokens, self.heads * width), dtype),
                "present_key": unwritten(cache, dtype),
                "present_value": unwritten(cache, dtype),
            },
            self.workers,
        )

    def check(self, y: np.ndarray, present_key: np.ndarray, present_value: np.ndarray) -> float:
        batch, kv_heads, _, width = self.past_key.shape
        tokens, total, dtype = self.x.shape[1], self.visible.shape[-1], self.x.dtype
        cos, sin = (f(self.angles).astype(dtype).astype(np.float64)[:, :, None] for f in (np.cos, np.sin))
        by_head = self.x.astype(np.float64).reshape(batch, tokens, self.heads + 2 * kv_heads, width)
        first, second = np.split(by_head[:, :, : self.heads + kv_heads], 2, axis=-1)
        turned = np.concatenate((cos * first - sin * second, sin * first + cos * second), axis=-1)
        query, key, value = (
            turned[:, :, : self.heads],
            turned[:, :, self.heads :],
            by_head[:, :, self.heads + kv_heads :],
        )
        unit = 2.0 ** (-10 if dtype == np.float16 else -22)
        for got, past, new in ((present_key, self.past_key, key), (present_value, self.past_value, value)):
            np.testing.assert_array_equal(got[:, :, : total - tokens], past[:, :, : total - tokens])
            np.testing.assert_array_equal(got[:, :, total:], past[:, :, total:])
            written = got[:, :, total - tokens : total]
            np.testing.assert_allclose(written, new.transpose(0, 2, 1, 3), rtol=unit, atol=4 * unit)
        keys, values = (
            np.repeat(cache[:, :, :total].astype(np.float64), self.heads // kv_heads, axis=1)
            for cache in (present_key, present_value)
        )
        scores = query.transpose(0, 2, 1, 3) @ keys.transpose(0, 1, 3, 2) / np.sqrt(width)
        scores = np.where(self.visible[:, None], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True, initial=-1e9))
        expected = (weights @ values / weights.sum(-1, keepdims=True)).transpose(0, 2, 1, 3).reshape(y.shape)
        # A score of size s rounds by s * width * eps at most, and a weight by as much of itself.
        largest = float(np.abs(np.where(np.isfinite(scores), scores, 0)).max(initial=1.0))
        bound = (2.0**-23 * (width * largest + total) + (2.0**-10 if dtype == np.float16 else 0)) * 4
        return error_share(y, expected, bound * max(1.0, float(np.abs(values).max(initial=0))), str(self.x.shape))


def made(
    rng: np.random.Generator, sizes: tuple[int, ...], room: int, mask: str, dtype: type, workers: int
) -> CachedAttention:
    """``sizes`` are batch, tokens, past, heads, kv_heads, width; ``room`` is how much more than its past a cache holds."""
    batch, tokens, past, heads, kv_heads, width = sizes
    cache = (batch, kv_heads, past + room, width)
    return CachedAttention(
        rng.standard_normal((batch, tokens, (heads + 2 * kv_heads) * width)).astype(dtype),
        rng.uniform(0, 6, (batch, tokens, width // 2)).astype(np.float32),
        mask_of(rng, batch, tokens, past + tokens, mask),
        rng.standard_normal(cache).astype(dtype),
        rng.standard_normal(cache).astype(dtype),
        heads,
        workers,
    )


def cases(rng: np.random.Generator) -> Iterator[CachedAttention]:
    shapes = (
        (1, 1, 0, 2, 1, 2),
        (2, 1, 9, 3, 3, 6),
        (1, 3, 0, 4, 2, 16),
        (2, 5, 12, 6, 3, 10),
        (1, 1, 255, 8, 2, 24),
        (1, 1, 256, 8, 2, 8),
        (1, 40, 250, 6, 2, 12),  # rows of a head and keys beyond one block each
        (1, 2, 64, 71, 1, 8),  # a group wider than a block of rows
        (0, 1, 3, 2, 1, 4),
        (1, 0, 3, 2, 1, 4),
    )
    for i, sizes in enumerate(shapes):
        for j, mask in enumerate(MASKS):
            dtype = np.float16 if (i + j) % 3 == 0 else np.float32
            yield made(rng, sizes, (i + j) % 3 * 4, mask, dtype, 1 + (i + j) % 2)
    for dtype in (np.float32, np.float16):
        yield made(rng, (1, 1, 700, 20, 5, 64), 0, "causal", dtype, 3)  # chunks of keys are pieces of work
        yield made(rng, (1, 1, 520, 9, 1, 64), 70, "window", dtype, 4)
        yield made(rng, (1, 70, 30, 6, 2, 32), 5, "left padding", dtype, 2)
    yield made(rng, (3, 4, 300, 8, 4, 32), 0, "random", np.float32, 3)
