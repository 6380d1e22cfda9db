"""CachedAttention on a GPU (:mod:`qsparse_export.ops.cached_attention` has the formula): the new rows of the cache, attention
over slices of it, and the slices put together.

A block has one query of one head. It reads its keys in tiles, and keeps the softmax up to date from tile to tile (online
softmax, arXiv 1805.02867). Slices are worked on by blocks of their own, so that a single token fills a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from qsparse_export.errors import UsageError
from qsparse_export.runtimes.tvm.gpu import float_bits
from qsparse_export.runtimes.tvm.gpu.float_bits import wide
from qsparse_export.runtimes.tvm.gpu.program import Program, check_sizes
from qsparse_export.runtimes.tvm.gpu.workgroup import (
    THREADS,
    added,
    assign,
    barrier,
    ceil_div,
    kernel,
    local,
    shared,
    threads,
    variable,
    when,
)
from qsparse_export.runtimes.tvm.kernels.exponential import exponential

KEYS = 64
"""Of a tile."""
KEY_THREADS = THREADS // KEYS
"""That share the product of a query with a key."""
MANY_SLICES = 8
"""Of the keys, where there are few queries."""
_LOWEST = -3.4028234663852886e38


def cached_attention(
    *, heads: int, kv_heads: int, width: int, dtype: str = "float32", slices: int = 1, mask_dtype: str = "bool"
) -> Program:
    """qkv [B * S, (heads + 2 kv_heads) * width], cos and sin [B, S, width / 2], visible [B, 1, S, T], caches
    "key" and "value" [B, kv_heads, C, width] with C >= T to y [B * S, heads * width], all of ``dtype`` but the mask: that is of
    ``mask_dtype``, int32 for WebGPU, which has no bytes.

    The rows T - S to T - 1 of both caches are written in place. UsageError for heads that are not a multiple of
    ``kv_heads``, and an odd width.
    """
    check_sizes(width, dtype)
    if kv_heads < 1 or heads % kv_heads or width % 2 or slices < 1:
        raise UsageError(
            f"{heads} heads on {kv_heads} of keys and values, {width} wide, in {slices} slices; expected a multiple, "
            "an even width, and a slice at least"
        )
    attention = _Attention(heads, kv_heads, width, dtype, slices, mask_dtype)
    kernels = (attention.remember(), attention.attend(), attention.finish())
    return Program(kernels, ("qkv", "cos", "sin", "visible", "key", "value"), ("y",), in_place=("key", "value"))


@dataclass(frozen=True)
class _Attention:
    """What is static; each method makes a kernel."""

    heads: int
    kv_heads: int
    width: int
    dtype: str
    slices: int
    mask_dtype: str

    @property
    def half(self) -> int:
        """Pairs of values that turn together."""
        return self.width // 2

    def _arguments(self, *names: str) -> dict[str, tirx.Var]:
        """The tensors of these names, and the sizes "m", "tokens" and "total"."""
        m, batch, tokens, total, room = (tirx.Var(name, "int32") for name in ("m", "batch", "tokens", "total", "room"))
        shapes = {
            "qkv": ((m, (self.heads + 2 * self.kv_heads) * self.width), self.dtype),
            "cos": ((batch, tokens, self.half), self.dtype),
            "sin": ((batch, tokens, self.half), self.dtype),
            "visible": ((batch, 1, tokens, total), self.mask_dtype),
            "key": ((batch, self.kv_heads, room, self.width), self.dtype),
            "value": ((batch, self.kv_heads, room, self.width), self.dtype),
            "softmax": ((m, self.heads, self.slices, 2), "float32"),
            "parts": ((m, self.heads, self.slices, self.width), "float32"),
            "y": ((m, self.heads * self.width), self.dtype),
        }
        arguments = {name: T.arg(name, T.buffer(*shapes[name])) for name in names}
        return arguments | {"m": m, "tokens": tokens, "total": total}

    def _turned(
        self, given: dict[str, tirx.Var], row: tirx.Expr, begin: tirx.Expr, pair: tirx.Expr
    ) -> tuple[tirx.Expr, tirx.Expr]:
        """The values ``pair`` and half a head on of a head of a row, turned by its position."""
        b, s = T.bind(row // given["tokens"]), T.bind(row % given["tokens"])
        c, d = (T.bind(wide(given[name][b, s, pair])) for name in ("cos", "sin"))
        first = T.bind(wide(given["qkv"][row, begin + pair]))
        second = T.bind(wide(given["qkv"][row, begin + self.half + pair]))
        return c * first - d * second, d * first + c * second

    def remember(self) -> tirx.PrimFunc:
        """Writes the turned keys and the values of a row behind what the caches hold."""

        def body() -> None:
            given = self._arguments("qkv", "cos", "sin", "visible", "key", "value")
            with threads(given["m"]) as (row, _, thread):
                b, s = T.bind(row // given["tokens"]), T.bind(row % given["tokens"])
                position = T.bind(given["total"] - given["tokens"] + s)
                pairs = self.kv_heads * self.half
                with T.serial(0, -(-pairs // THREADS)) as r, when(r * THREADS + thread < pairs):
                    head = T.bind((r * THREADS + thread) // self.half)
                    pair = T.bind((r * THREADS + thread) % self.half)
                    turned = self._turned(given, row, T.bind((head + self.heads) * self.width), pair)
                    begin = T.bind((head + (self.heads + self.kv_heads)) * self.width)
                    for i, value in enumerate(turned):
                        column = T.bind(pair + i * self.half)
                        assign(given["key"], T.Cast(self.dtype, value), b, head, position, column)
                        assign(given["value"], given["qkv"][row, begin + column], b, head, position, column)

        return kernel("attention_remember", body)

    def attend(self) -> tirx.PrimFunc:
        """From all of them to "softmax" and "parts" of each slice: its largest score and the sum of its weights against that,
        and the values by weight.
        """
        columns = min(self.width, THREADS)
        sharing, rounds = THREADS // columns, -(-self.width // columns)

        def body() -> None:
            given = self._arguments("qkv", "cos", "sin", "visible", "key", "value", "softmax", "parts")
            with threads(given["m"] * self.slices, self.heads) as (block, head, thread):
                row, slice_ = T.bind(block // self.slices), T.bind(block % self.slices)
                b, s = T.bind(row // given["tokens"]), T.bind(row % given["tokens"])
                kv_head = T.bind(head // (self.heads // self.kv_heads))
                query = shared((self.width,), "float32")
                scores, weights = shared((KEYS, KEY_THREADS), "float32"), shared((KEYS,), "float32")
                sums = shared((sharing, columns), "float32")
                with T.serial(0, -(-self.half // THREADS)) as r, when(r * THREADS + thread < self.half):
                    pair = T.bind(r * THREADS + thread)
                    for i, value in enumerate(self._turned(given, row, head * self.width, pair)):
                        assign(query, value * T.float32(self.width**-0.5), pair + i * self.half)
                barrier()
                peak, weight_sum = variable("float32", _LOWEST), variable("float32", 0.0)
                result = local(rounds, "float32", 0.0)
                key_of, part = T.bind(thread // KEY_THREADS), T.bind(thread % KEY_THREADS)
                own, column_of = T.bind(thread // columns), T.bind(thread % columns)
                tiles = ceil_div(given["total"], KEYS)
                with T.serial(0, ceil_div(T.max(tiles - slice_, 0), self.slices)) as step:
                    first = T.bind((slice_ + step * self.slices) * KEYS)
                    count = T.bind(T.min(given["total"] - first, KEYS))
                    dot = variable("float32", 0.0)
                    with when(key_of < count), T.serial(0, -(-self.width // KEY_THREADS)) as i:
                        column = T.bind(i * KEY_THREADS + part)
                        with when(column < self.width):
                            assign(dot, dot[0] + query[column] * wide(given["key"][b, kv_head, first + key_of, column]))
                    assign(scores, dot[0], key_of, part)
                    barrier()
                    with when(part == 0):
                        score = T.bind(added([scores[key_of, i] for i in range(KEY_THREADS)]))
                        mask = given["visible"][b, 0, s, T.min(first + key_of, given["total"] - 1)]
                        shows = mask if self.mask_dtype == "bool" else mask != tirx.const(0, self.mask_dtype)
                        is_visible = tirx.all(key_of < count, shows)
                        infinity = T.uint32(float_bits.INFINITY)
                        limit = T.bind(
                            T.reinterpret(
                                "float32", T.Select(is_visible, infinity, infinity | T.uint32(float_bits.SIGN))
                            )
                        )
                        # What is hidden is minus infinity even where it is NaN, and a NaN that is visible becomes infinity.
                        assign(weights, T.Select(score < limit, score, limit), key_of)
                    barrier()
                    largest, score_of = variable("float32", peak[0]), variable("float32", weights[key_of])
                    with T.serial(0, KEYS) as i:
                        assign(largest, T.max(largest[0], weights[i]))
                    barrier()
                    shrink = T.bind(exponential(peak[0] - largest[0], 1))
                    assign(peak, largest[0])
                    with when(part == 0):
                        assign(weights, exponential(score_of[0] - peak[0], 1), key_of)
                    barrier()
                    assign(weight_sum, weight_sum[0] * shrink)
                    with T.serial(0, KEYS) as i:
                        assign(weight_sum, weight_sum[0] + weights[i])
                    with when(own < sharing):
                        for r in range(rounds):
                            column = T.bind(T.min(column_of + r * columns, self.width - 1))
                            assign(result, result[r] * shrink, r)
                            with T.serial(0, ceil_div(T.max(count - own, 0), sharing)) as i:
                                t = T.bind(own + i * sharing)
                                value = wide(given["value"][b, kv_head, first + t, column])
                                assign(result, result[r] + weights[t] * value, r)
                    barrier()
                for r in range(rounds):
                    with when(own < sharing):
                        assign(sums, result[r], own, column_of)
                    barrier()
                    column = T.bind(thread + r * columns)
                    with when(tirx.all(thread < columns, column < self.width)):
                        value = added([sums[i, thread] for i in range(sharing)])
                        assign(given["parts"], value, row, head, slice_, column)
                    barrier()
                with when(thread == 0):
                    assign(given["softmax"], peak[0], row, head, slice_, 0)
                    assign(given["softmax"], weight_sum[0], row, head, slice_, 1)

        return kernel("attention_slices", body)

    def finish(self) -> tirx.PrimFunc:
        """The slices against the largest score of all, and divided by the sum of all weights. No visible key: 0 / 0."""

        def body() -> None:
            given = self._arguments("softmax", "parts", "y")
            outputs = self.heads * self.width
            with threads(given["m"], -(-outputs // THREADS)) as (row, tile, thread):
                output = T.bind(tile * THREADS + thread)
                with when(output < outputs):
                    head, column = T.bind(output // self.width), T.bind(output % self.width)
                    peak = variable("float32", _LOWEST)
                    for i in range(self.slices):
                        assign(peak, T.max(peak[0], given["softmax"][row, head, i, 0]))
                    weight, value = variable("float32", 0.0), variable("float32", 0.0)
                    for i in range(self.slices):
                        factor = T.bind(exponential(given["softmax"][row, head, i, 0] - peak[0], 1))
                        assign(weight, weight[0] + factor * given["softmax"][row, head, i, 1])
                        assign(value, value[0] + factor * given["parts"][row, head, i, column])
                    assign(given["y"], T.Cast(self.dtype, value[0] / weight[0]), row, output)

        return kernel("attention_finish", body)
