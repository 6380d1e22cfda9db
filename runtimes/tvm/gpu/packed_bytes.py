"""Four bytes in a word: transposed, and multiplied by four others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm import tirx
from tvm.tirx.script.builder import ir as T

Dot = Callable[[tirx.Expr, tirx.Expr, tirx.Expr], tirx.Expr]
"""dot(codes, values, sum): sum plus the products of four codes 0..127 (uint32) with four int8 (uint32), int32."""


def transposed(words: Sequence[tirx.Expr]) -> list[tirx.Expr]:
    """Four uint32 to four: byte i of word j becomes byte j of word i."""
    even, low = T.uint32(0x00FF00FF), T.uint32(0x0000FFFF)
    eight, sixteen = T.uint32(8), T.uint32(16)
    a, b, c, d = words
    pairs = [
        [T.bind(first & even | (second & even) << eight) for first, second in ((a, b), (c, d))],
        [T.bind(first >> eight & even | second & ~even) for first, second in ((a, b), (c, d))],
    ]
    return [
        T.bind(upper << sixteen | lower & low) if half == 0 else T.bind(lower >> sixteen | upper & ~low)
        for half in (0, 1)
        for lower, upper in pairs
    ]


def plain_dot(codes: tirx.Expr, values: tirx.Expr, total: tirx.Expr) -> tirx.Expr:
    """In operations that every target has."""
    for i in range(4):
        code = T.Cast("int32", codes >> T.uint32(8 * i) & T.uint32(255))
        value = T.Cast("int32", values << T.uint32(24 - 8 * i)) >> 24
        total = total + code * value
    return total


def dp4a(codes: tirx.Expr, values: tirx.Expr, total: tirx.Expr) -> tirx.Expr:
    """The instruction of NVIDIA GPUs from sm_61 on."""
    signed = (T.Cast("int32", word) for word in (codes, values))
    return T.call_pure_extern("int32", "__dp4a", *signed, total)
