"""Floats by their bits: comparisons with NaN and Inf that no compiler's idea of fast arithmetic changes.

WebGPU may take it that there is no NaN or Inf, so that ``x != x`` and ``x < inf`` need not work there; integers do.
"""

from __future__ import annotations

import struct

from tvm import tirx
from tvm.tirx.script.builder import ir as T

SIGN = 0x80000000
INFINITY = 0x7F800000
NOT_A_NUMBER = 0x7FC00000


def bits_of(value: float) -> int:
    """Of a float32."""
    return struct.unpack("<I", struct.pack("<f", value))[0]


def wide(value: tirx.Expr) -> tirx.Expr:
    """A float16 or float32 as float32."""
    return T.Cast("float32", value)


def magnitude(value: tirx.Expr) -> tirx.Expr:
    """uint32 of the order of |value| for float32, NaN above all."""
    return T.reinterpret("uint32", value) & T.uint32(SIGN - 1)


def is_nan(value: tirx.Expr) -> tirx.Expr:
    """Of a float32."""
    return magnitude(value) > T.uint32(INFINITY)


def half_to_float(half: tirx.Expr) -> tirx.Expr:
    """The float32 of a float16 in the lower half of a uint32, for targets without float16.

    A normal number moves its exponent and mantissa up by 13 bits and gets another bias (127 - 15 = 112); a subnormal one is
    its mantissa times 2**-24; 31 as exponent becomes 255.
    """
    exponent_and_mantissa = half & T.uint32(0x7FFF)
    moved = exponent_and_mantissa << T.uint32(13)
    normal = T.reinterpret("float32", moved + T.uint32(112 << 23))
    subnormal = T.Cast("float32", exponent_and_mantissa) * T.float32(2.0**-24)
    unlimited = T.reinterpret("float32", moved + T.uint32(224 << 23))
    finite = T.Select(exponent_and_mantissa < T.uint32(0x400), subnormal, normal)
    value = T.Select(exponent_and_mantissa >= T.uint32(0x7C00), unlimited, finite)
    return T.Select((half & T.uint32(0x8000)) != T.uint32(0), T.float32(0) - value, value)
