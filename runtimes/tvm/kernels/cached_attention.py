"""CachedAttention: rotary positions, the new rows of the cache, and attention over all of it
(:mod:`qsparse_export.ops.cached_attention` has the formula).

The keys are read in tiles, and the softmax is kept up to date from tile to tile (online softmax, arXiv 1805.02867), so that
a task needs a few KiB of scratch however long the past is. One task is one query row of one KV head: the query heads that
share it read its keys once.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from qsparse_export.runtimes.tvm.kernels.emit import largest_lane, load, store, sum_of_lanes, sums_of_lanes, vector
from qsparse_export.runtimes.tvm.kernels.exponential import exponential
from qsparse_export.runtimes.tvm.lanes import Lanes

KEYS = 32
"""Keys of a tile."""

COLUMNS = 8
"""Vectors of values that are added up side by side: they stay in registers."""

_LOWEST = -3.4028234663852886e38


def cached_attention(lanes: Lanes, *, heads: int, kv_heads: int, width: int) -> tirx.PrimFunc:
    """qkv float32 [B * S, (heads + 2 kv_heads) * width], cos and sin [B, S, width / 2], visible bool [B, 1, S, T], caches
    [B, kv_heads, C, width] with C >= T to y [B * S, heads * width].

    The rows T - S to T - 1 of both caches are written in place; the rows before them are the past.
    """
    m, batch, tokens, total, room = (tirx.Var(name, "int64") for name in ("m", "batch", "tokens", "total", "room"))
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("cached_attention")
        T.func_attr({"tirx.noalias": True})
        qkv = T.arg("qkv", T.buffer((m, (heads + 2 * kv_heads) * width), "float32"))
        cos = T.arg("cos", T.buffer((batch, tokens, width // 2), "float32"))
        sin = T.arg("sin", T.buffer((batch, tokens, width // 2), "float32"))
        visible = T.arg("visible", T.buffer((batch, 1, tokens, total), "bool"))
        key = T.arg("key", T.buffer((batch, kv_heads, room, width), "float32"))
        value = T.arg("value", T.buffer((batch, kv_heads, room, width), "float32"))
        y = T.arg("y", T.buffer((m, heads * width), "float32"))
        task = _Task(lanes, heads, kv_heads, width, qkv, cos, sin, visible, key, value, y)

        def remember(index: Any) -> None:
            b, s = T.bind(index // tokens), T.bind(index % tokens)
            with T.serial(0, kv_heads) as head:
                task.remember(b, s, head, index, total - tokens + s)

        def attend(index: Any) -> None:
            b = T.bind(index // (kv_heads * tokens))
            head = T.bind(index // tokens % kv_heads)
            task.attend(b, T.bind(index % tokens), head, total, tokens)

        with T.If(m == 1):
            with T.Then(), T.serial(0, 1) as index:
                remember(index)
            with T.Else(), T.parallel(0, m) as index:
                remember(index)
        with T.parallel(0, batch * kv_heads * tokens) as index:
            attend(index)
    return builder.get()


class _Task:
    """The buffers of a call and the static sizes; each method writes the statements of one step."""

    def __init__(self, lanes: Lanes, heads: int, kv_heads: int, width: int, *buffers: Any) -> None:
        self.heads, self.kv_heads, self.width = heads, kv_heads, width
        self.group = heads // kv_heads
        self.vector = _divisor(width, lanes.floats)
        self.lanes = lanes.floats
        self.qkv, self.cos, self.sin, self.visible, self.key, self.value, self.y = buffers

    def remember(self, b: Any, s: Any, head: Any, row: Any, position: Any) -> None:
        """Writes the turned key and the value of one token and KV head into the caches."""
        self._turn(b, s, row, (self.heads + head) * self.width, self.key, [b, head, position], 0, 1.0)
        begin = (self.heads + self.kv_heads + head) * self.width
        with T.serial(0, self.width // self.vector) as i:
            column = T.bind(i * self.vector)
            store(
                self.value, load(self.qkv, [row], begin + column, self.vector), [b, head, position], column, self.vector
            )

    def _turn(
        self, b: Any, s: Any, row: Any, begin: Any, target: Any, at: list[Any], column: Any, factor: float
    ) -> None:
        """One head of a row, turned by its position and times ``factor``, into ``target[at, column:]``."""
        half = self.width // 2
        lanes = _divisor(half, self.lanes)
        with T.serial(0, half // lanes) as i:
            offset = T.bind(i * lanes)
            c, d = (T.bind(load(table, [b, s], offset, lanes)) for table in (self.cos, self.sin))
            first = T.bind(load(self.qkv, [row], begin + offset, lanes))
            second = T.bind(load(self.qkv, [row], begin + half + offset, lanes))
            scale = vector(factor, "float32", lanes)
            store(target, (c * first - d * second) * scale, at, column + offset, lanes)
            store(target, (d * first + c * second) * scale, at, column + half + offset, lanes)

    def attend(self, b: Any, s: Any, head: Any, total: Any, tokens: Any) -> None:
        """The query heads of one KV head at one token: ``y = softmax(q k^T / sqrt(width)) v``."""
        group, width = self.group, self.width
        row = T.bind(b * tokens + s)
        query = T.alloc_buffer((group, width), "float32", scope="local")
        scores = T.alloc_buffer((group, KEYS), "float32", scope="local")
        result = T.alloc_buffer((group, width), "float32", scope="local")
        bound = T.alloc_buffer((KEYS,), "float32", scope="local")
        peak = T.alloc_buffer((group,), "float32", scope="local")
        weight_sum = T.alloc_buffer((group,), "float32", scope="local")
        with T.serial(0, group) as g:
            self._turn(b, s, row, (head * group + g) * width, query, [g], 0, width**-0.5)
            T.buffer_store(peak, vector(_LOWEST, "float32", 1), [g])
            T.buffer_store(weight_sum, vector(0.0, "float32", 1), [g])
            with T.serial(0, width // self.vector) as i:
                store(result, vector(0.0, "float32", self.vector), [g], i * self.vector, self.vector)
        with T.serial(0, T.floordiv(total + KEYS - 1, KEYS)) as tile:
            first = T.bind(tile * KEYS)
            count = T.bind(T.min(total - first, KEYS))
            seen = T.alloc_buffer((1,), "int32", scope="local")
            T.buffer_store(seen, tirx.const(0, "int32"), [0])
            with T.serial(0, count) as t:
                is_visible = T.bind(self.visible[b, 0, s, first + t])
                T.buffer_store(seen, seen[0] + T.cast(is_visible, "int32"), [0])
                limits = (vector(float(word), "float32", 1) for word in ("inf", "-inf"))
                T.buffer_store(bound, T.Select(is_visible, *limits), [t])
            with T.If(seen[0] != 0), T.Then():
                self._score(b, head, first, count, query, bound, scores)
                with T.serial(0, group) as g:
                    self._weigh(g, scores, result, peak, weight_sum)
                    self._add_values(b, head, g, first, count, scores, result)
        with T.serial(0, group) as g:
            # No visible key: 0 / 0, a row of NaN.
            total_weight = T.bind(weight_sum[g])
            with T.serial(0, width // self.vector) as i:
                column = T.bind(i * self.vector)
                spread = total_weight if self.vector == 1 else T.Broadcast(total_weight, self.vector)
                mean = load(result, [g], column, self.vector) / spread
                store(self.y, mean, [row], (head * group + g) * width + column, self.vector)

    def _score(self, b: Any, head: Any, first: Any, count: Any, query: Any, bound: Any, scores: Any) -> None:
        """Products of the queries with the keys of a tile, minus infinity for keys that are not there or not visible."""
        at_once = self.lanes if self.vector == self.lanes else 1
        blocks = T.bind(T.floordiv(count, at_once))
        with T.serial(0, blocks) as block, T.serial(0, self.group) as g:
            self._score_keys(b, head, first, block * at_once, at_once, g, query, bound, scores)
        if at_once > 1:
            with T.serial(blocks * at_once, count) as t, T.serial(0, self.group) as g:
                self._score_keys(b, head, first, t, 1, g, query, bound, scores)
        with T.serial(count, KEYS) as t, T.serial(0, self.group) as g:
            T.buffer_store(scores, vector(float("-inf"), "float32", 1), [g, t])

    def _score_keys(
        self, b: Any, head: Any, first: Any, t: Any, keys: int, g: Any, query: Any, bound: Any, scores: Any
    ) -> None:
        """The scores of ``keys`` neighbouring keys, whose sums run side by side."""
        dots = T.alloc_buffer((keys * self.vector,), "float32", scope="local")
        for k in range(keys):
            store(dots, vector(0.0, "float32", self.vector), [], k * self.vector, self.vector)
        for i in range(self.width // self.vector):
            part = T.bind(load(query, [g], i * self.vector, self.vector))
            for k in range(keys):
                product = part * load(self.key, [b, head, first + t + k], i * self.vector, self.vector)
                store(dots, load(dots, [], k * self.vector, self.vector) + product, [], k * self.vector, self.vector)
        sums = [load(dots, [], k * self.vector, self.vector) for k in range(keys)]
        score = T.bind(sum_of_lanes(sums[0], self.vector) if keys == 1 else sums_of_lanes(sums))
        limit = load(bound, [], t, keys)
        # What is hidden is minus infinity even where it is NaN, and a NaN that is visible becomes infinity: a row of NaN.
        store(scores, T.Select(score < limit, score, limit), [g], t, keys)

    def _weigh(self, g: Any, scores: Any, result: Any, peak: Any, weight_sum: Any) -> None:
        """Scores of a tile to weights against the largest score so far; what was summed before is brought down to it."""
        vectors = [load(scores, [g], i, self.lanes) for i in range(0, KEYS, self.lanes)]
        tile_peak = vectors[0]
        for part in vectors[1:]:
            tile_peak = T.max(tile_peak, part)
        largest = T.bind(T.max(peak[g], largest_lane(tile_peak, self.lanes)))
        shrink = T.bind(exponential(peak[g] - largest, 1))
        T.buffer_store(peak, largest, [g])
        sums = T.alloc_buffer((self.lanes,), "float32", scope="local")
        store(sums, vector(0.0, "float32", self.lanes), [], 0, self.lanes)
        with T.serial(0, KEYS // self.lanes) as i:
            column = T.bind(i * self.lanes)
            weights = exponential(load(scores, [g], column, self.lanes) - T.Broadcast(peak[g], self.lanes), self.lanes)
            store(scores, weights, [g], column, self.lanes)
            store(sums, load(sums, [], 0, self.lanes) + weights, [], 0, self.lanes)
        tile_sum = sum_of_lanes(load(sums, [], 0, self.lanes), self.lanes)
        T.buffer_store(weight_sum, weight_sum[g] * shrink + tile_sum, [g])
        spread = shrink if self.vector == 1 else T.Broadcast(shrink, self.vector)
        with T.serial(0, self.width // self.vector) as i:
            column = T.bind(i * self.vector)
            store(result, load(result, [g], column, self.vector) * spread, [g], column, self.vector)

    def _add_values(self, b: Any, head: Any, g: Any, first: Any, count: Any, scores: Any, result: Any) -> None:
        """Adds the values of a tile by weight, as many columns at a time as stay in registers."""
        vectors = self.width // self.vector
        for begin in range(0, vectors, COLUMNS):
            columns = [i * self.vector for i in range(begin, min(begin + COLUMNS, vectors))]
            sums = T.alloc_buffer((len(columns) * self.vector,), "float32", scope="local")
            for i, column in enumerate(columns):
                store(sums, load(result, [g], column, self.vector), [], i * self.vector, self.vector)
            with T.serial(0, count) as t:
                weight = T.bind(scores[g, t])
                spread = weight if self.vector == 1 else T.Broadcast(weight, self.vector)
                for i, column in enumerate(columns):
                    product = spread * load(self.value, [b, head, first + t], column, self.vector)
                    store(
                        sums, load(sums, [], i * self.vector, self.vector) + product, [], i * self.vector, self.vector
                    )
            for i, column in enumerate(columns):
                store(result, load(sums, [], i * self.vector, self.vector), [g], column, self.vector)


def _divisor(size: int, largest: int) -> int:
    """The largest power of two up to ``largest`` that divides ``size``."""
    lanes = largest
    while size % lanes:
        lanes //= 2
    return lanes
