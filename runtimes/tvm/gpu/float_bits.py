"""Floats by their bits: what no compiler's idea of fast arithmetic changes.

WebGPU may take it that there is no NaN or Inf, so that ``x != x`` and ``x < inf`` need not work there; and neither its
divisions nor OpenCL's are rounded correctly (2.5 units in the last place). Integers are the same everywhere.
"""

from __future__ import annotations

import struct

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from qsparse_export.runtimes.tvm.gpu.workgroup import assign, variable

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


def nan_of_infinite(value: tirx.Expr) -> tirx.Expr:
    """A float32, but NaN for Inf too: what an op multiplies that has a row of NaN for a row with either. NaN times 0 is NaN."""
    is_infinite = magnitude(value) == T.uint32(INFINITY)
    bits = T.Select(is_infinite, T.uint32(NOT_A_NUMBER), T.reinterpret("uint32", value))
    return T.reinterpret("float32", bits)


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


def divided(dividend: tirx.Expr, divisor: tirx.Expr) -> tirx.Expr:
    """The bits of a quotient, rounded to nearest even, from those of two float32: all positive and normal, uint32.

    Long division of the mantissas a and b, 24 bits each. Once a is doubled where it is less than b, a / b is in [1, 2): its
    first bit is 1 and 23 more follow. The remainder then says how to round; the carry of a mantissa of all ones goes into
    the exponent, as it should.
    """
    a_bits, b_bits = T.bind(dividend), T.bind(divisor)
    a, b = (T.bind((bits & T.uint32(0x7FFFFF)) | T.uint32(0x800000)) for bits in (a_bits, b_bits))
    is_less = T.bind(a < b)
    remainder = variable("uint32", T.Select(is_less, a + a, a) - b)
    quotient = variable("uint32", 1)
    with T.serial(0, 23):
        doubled = T.bind(remainder[0] + remainder[0])
        fits = T.bind(doubled >= b)
        assign(remainder, T.Select(fits, doubled - b, doubled))
        assign(quotient, quotient[0] + quotient[0] + T.Select(fits, T.uint32(1), T.uint32(0)))
    twice = T.bind(remainder[0] + remainder[0])
    is_odd = (quotient[0] & T.uint32(1)) == T.uint32(1)
    rounds_up = tirx.any(twice > b, tirx.all(twice == b, is_odd))
    exponent = (
        (a_bits >> T.uint32(23))
        + T.uint32(127)
        - (b_bits >> T.uint32(23))
        - T.Select(is_less, T.uint32(1), T.uint32(0))
    )
    mantissa = quotient[0] - T.uint32(0x800000) + T.Select(rounds_up, T.uint32(1), T.uint32(0))
    return T.bind((exponent << T.uint32(23)) + mantissa)
