"""exp(x) of float32 lanes."""

from __future__ import annotations

from typing import Any

from tvm.tirx.script.builder import ir as T

from qsparse_export.runtimes.tvm.kernels.emit import vector

LOWEST = -104.0  # its exponential is less than half the smallest float32: 0
_LOG2_E = 1.44269504088896341
# ln 2 in two parts: the first has so few digits that its product with an exponent is exact (Cody and Waite).
_LN2_HIGH = 0.693359375
_LN2_LOW = -2.12194440e-4
# exp(r) = 1 + r + r^2 p(r) for |r| <= ln 2 / 2, p of degree 5 (Moshier, Cephes expf): an error of about one unit in the
# last place.
_POLYNOMIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)


def exponential(x: Any, lanes: int) -> Any:
    """exp(x) of float32 lanes, subnormal numbers included; 0 from :data:`LOWEST` down, infinity above 88.7, NaN of NaN."""
    floor = vector(LOWEST, "float32", lanes)
    ceiling = vector(89.0, "float32", lanes)
    x = T.bind(x)
    # A NaN compares as false and stays.
    clamped = T.bind(T.Select(x < floor, floor, T.Select(x > ceiling, ceiling, x)))
    exponent = T.bind(T.floor(clamped * vector(_LOG2_E, "float32", lanes) + vector(0.5, "float32", lanes)))
    r = T.bind(clamped - exponent * vector(_LN2_HIGH, "float32", lanes) - exponent * vector(_LN2_LOW, "float32", lanes))
    polynomial = vector(_POLYNOMIAL[0], "float32", lanes)
    for coefficient in _POLYNOMIAL[1:]:
        polynomial = polynomial * r + vector(coefficient, "float32", lanes)
    integer = T.bind(T.cast(exponent, _typed("int32", lanes)))  # of a NaN: any number, and the product stays NaN
    # 2^exponent in two factors: 2^128 and 2^-150 have no float32.
    half = T.bind(T.shift_right(integer, vector(1, "int32", lanes)))
    result = T.bind(polynomial * r * r + r + vector(1.0, "float32", lanes))
    return T.bind(result * _power_of_two(half, lanes) * _power_of_two(integer - half, lanes))


def _power_of_two(exponent: Any, lanes: int) -> Any:
    return T.reinterpret(
        _typed("float32", lanes), T.shift_left(exponent + vector(127, "int32", lanes), vector(23, "int32", lanes))
    )


def _typed(dtype: str, lanes: int) -> str:
    return dtype if lanes == 1 else f"{dtype}x{lanes}"
