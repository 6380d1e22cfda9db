"""DenseMatMulNBits: the head, a group-quantised matrix that is read whole, output by output (``qsparse_export.ops``).

One row at a time where the sizes are whole units: activations become int16 of the largest of 32, products add up in integers
and become a float once per unit. Else, and for several rows at once, an output's weights are unpacked to float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from qsparse_export.formats import nbits
from qsparse_export.runtimes.tvm.kernels.emit import (
    INFINITY_BITS,
    add_to,
    const,
    fill,
    fill_rows,
    ramp,
    shuffled,
    total,
    vector,
)
from qsparse_export.runtimes.tvm.lanes import Lanes
from qsparse_export.runtimes.tvm.tiling import Tiling

UNIT = 32
"""Inputs whose activations share a unit, where the groups of the weights are made of them."""
INPUTS_AT_ONCE = 16
"""int16 products of a step."""
SUMS = 8
LARGEST_INT16 = 32767.0
SMALLEST_PEAK = 1e-35
ROWS_TOGETHER = 4
"""From so many rows on, an output's weights are unpacked once for all of them."""


@dataclass(frozen=True)
class _Product:
    lanes: Lanes
    n: int
    k_in: int
    bits: int
    group: int

    @property
    def row_bytes(self) -> int:
        return nbits.output_row_bytes(self.k_in, self.bits)

    @property
    def groups(self) -> int:
        return nbits.group_count(self.k_in, self.group)

    @property
    def bias(self) -> int:
        return 1 << self.bits - 1

    @property
    def units(self) -> int:
        """Whole units of the inputs; 0 where a group is not made of them."""
        whole = self.k_in % UNIT == 0 and (self.group % UNIT == 0 or self.groups == 1)
        return self.k_in // UNIT if whole else 0

    @property
    def padded(self) -> int:
        """Inputs, padded to whole vectors."""
        return max(-(-self.k_in // UNIT), 1) * UNIT


def dense_matmul_nbits(lanes: Lanes, *, n: int, k_in: int, bits: int, group: int, tiling: Tiling) -> tirx.PrimFunc:
    """(x float32 [M, k_in], w uint8 [n, output_row_bytes(k_in)], scales float16 [n, groups], y float32 [M, n]), M dynamic.

    Within the bound of the op. Of the tiling, only the outputs count.
    """
    product = _Product(lanes, n, k_in, bits, group)
    rows = tirx.Var("rows", "int64")
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("dense_matmul_nbits")
        T.func_attr({"tirx.noalias": True})
        x = T.arg("x", T.buffer((rows, k_in), "float32"))
        w = T.arg("w", T.buffer((n, product.row_bytes), "uint8"))
        scales = T.arg("scales", T.buffer((n, product.groups), "float16"))
        y = T.arg("y", T.buffer((rows, n), "float32"))
        if not k_in or not n:
            fill_rows(y, rows, n)
        elif product.units:
            with T.If(rows < ROWS_TOGETHER):
                with T.Then(), T.serial(0, rows) as row:
                    _in_integers(product, x, w, scales, y, row, tiling.outputs)
                with T.Else():
                    _in_floats(product, x, w, scales, y, rows, tiling.outputs)
        else:
            _in_floats(product, x, w, scales, y, rows, tiling.outputs)
    return builder.get()


def _in_integers(product: _Product, x: Any, w: Any, scales: Any, y: Any, row: Any, at_once: int) -> None:
    values = T.alloc_buffer(
        (product.k_in,), "int16"
    )  # of a unit at 4 bits: those of even inputs, then those of odd ones
    sizes = T.alloc_buffer((product.units,), "float32")
    biases = T.alloc_buffer((product.units, SUMS), "int32")
    bad = T.alloc_buffer((1,), "int32")
    _quantize(product, x, row, values, sizes, biases, bad)
    with T.parallel(0, -(-product.n // at_once)) as part:
        factors = T.alloc_buffer((product.units,), "float32")
        with T.serial(0, T.min(const(at_once, "int32"), product.n - part * at_once)) as i:
            output = T.bind(part * at_once + i)
            _factors(product, scales, output, sizes, factors)
            sums = T.alloc_buffer((SUMS,), "float32", scope="local")
            fill(sums, 0, SUMS, "float32", SUMS)
            with T.serial(0, product.units) as unit:
                products = biases[unit, ramp(0, SUMS)]
                for codes, at in _codes(product, w, output, unit):
                    products = products + _pairs(product, codes, values[ramp(unit * UNIT + at, INPUTS_AT_ONCE)])
                add_to(sums, 0, T.Cast(f"float32x{SUMS}", products) * vector(factors[unit], "float32", SUMS))
            value = T.Select(bad[0] != 0, const(float("nan"), "float32"), total(sums, SUMS))
            T.buffer_store(y, value, [row, output])


def _factors(product: _Product, scales: Any, output: Any, sizes: Any, factors: Any) -> None:
    """What an integer sum of each unit counts: the scale of its weights times the size of its activations."""
    if product.group == UNIT and product.units % SUMS == 0:
        with T.serial(0, product.units // SUMS) as i:
            at = ramp(i * SUMS, SUMS)
            T.buffer_store(factors, T.Cast(f"float32x{SUMS}", scales[output, at]) * sizes[at], [at])
        return
    per_group = min(product.group, product.k_in) // UNIT
    with T.serial(0, product.groups) as group:
        scale = T.bind(T.Cast("float32", scales[output, group]))
        with T.serial(0, T.min(const(per_group, "int32"), product.units - group * per_group)) as i:
            unit = T.bind(group * per_group + i)
            T.buffer_store(factors, scale * sizes[unit], [unit])


def _quantize(product: _Product, x: Any, row: Any, values: Any, sizes: Any, biases: Any, bad: Any) -> None:
    """int16 activations, the size of their unit, and what the codes' bias adds to the sums, negated; ``bad``: NaN or Inf."""
    peak = T.alloc_buffer((1,), "int32", scope="local")
    count = T.alloc_buffer((1,), "int32", scope="local")
    T.buffer_store(bad, const(0, "int32"), [0])
    with T.serial(0, product.units) as unit:
        T.buffer_store(peak, const(0, "int32"), [0])
        T.buffer_store(count, const(0, "int32"), [0])
        with T.serial(0, UNIT) as i:
            bits = T.bitwise_and(T.reinterpret("int32", x[row, unit * UNIT + i]), const(0x7FFFFFFF, "int32"))
            T.buffer_store(peak, T.max(peak[0], bits), [0])
        with T.If(peak[0] >= INFINITY_BITS), T.Then():
            T.buffer_store(bad, const(1, "int32"), [0])
            T.buffer_store(peak, const(0, "int32"), [0])
        largest = T.bind(T.max(T.reinterpret("float32", peak[0]), const(SMALLEST_PEAK, "float32")))
        scale = T.bind(const(LARGEST_INT16, "float32") / largest)
        with T.serial(0, UNIT) as i:
            given = x[row, unit * UNIT + i]
            finite = T.Select(T.And(peak[0] > 0, bad[0] == 0), given, const(0.0, "float32"))
            rounded = T.bind(T.Cast("int32", T.nearbyint(finite * scale)))
            place = (i % 2) * (UNIT // 2) + i // 2 if product.bits == 4 else i
            T.buffer_store(values, T.Cast("int16", rounded), [unit * UNIT + place])
            add_to(count, 0, rounded)
        T.buffer_store(sizes, largest / const(LARGEST_INT16, "float32"), [unit])
        T.buffer_store(biases, vector(0, "int32", SUMS), [unit, ramp(0, SUMS)])
        T.buffer_store(biases, count[0] * const(-product.bias, "int32"), [unit, 0])


def _codes(product: _Product, w: Any, output: Any, unit: Any) -> list[tuple[Any, int]]:
    """int16x16 vectors of the unsigned codes of a unit, each with its first activation's place."""
    kind = f"int16x{INPUTS_AT_ONCE}"
    if product.bits == 8:
        return [
            (T.Cast(kind, w.vload([output, unit * UNIT + at], f"uint8x{INPUTS_AT_ONCE}")), at)
            for at in range(0, UNIT, INPUTS_AT_ONCE)
        ]
    both = T.bind(T.Cast(kind, w.vload([output, unit * (UNIT // 2)], f"uint8x{INPUTS_AT_ONCE}")))
    low = T.bitwise_and(both, vector(15, "int16", INPUTS_AT_ONCE))
    return [(low, 0), (T.shift_right(both, vector(4, "int16", INPUTS_AT_ONCE)), UNIT // 2)]


def _pairs(product: _Product, codes: Any, values: Any) -> Any:
    """int32x8: products of 16 codes and activations, two in a lane."""
    if product.lanes.pair_product:
        return T.call_llvm_pure_intrin(f"int32x{SUMS}", product.lanes.pair_product, codes, values)
    products = T.bind(T.Cast(f"int32x{INPUTS_AT_ONCE}", codes) * T.Cast(f"int32x{INPUTS_AT_ONCE}", values))
    halves = [shuffled([products], list(range(start, start + SUMS))) for start in (0, SUMS)]
    return halves[0] + halves[1]


def _in_floats(product: _Product, x: Any, w: Any, scales: Any, y: Any, rows: Any, at_once: int) -> None:
    lanes = product.lanes.floats
    padded = T.alloc_buffer((rows, product.padded), "float32")
    with T.parallel(0, rows) as row, T.serial(0, product.padded) as i, T.If(i < product.k_in):
        with T.Then():
            T.buffer_store(padded, x[row, T.min(i, const(product.k_in - 1, "int32"))], [row, i])
        with T.Else():
            T.buffer_store(padded, const(0.0, "float32"), [row, i])
    with T.parallel(0, -(-product.n // at_once)) as part:
        weights = T.alloc_buffer((product.padded,), "float32")
        fill(weights, 0, product.padded, "float32", lanes)
        with T.serial(0, T.min(const(at_once, "int32"), product.n - part * at_once)) as i:
            output = T.bind(part * at_once + i)
            with T.serial(0, product.k_in) as k:
                byte = T.Cast("int32", w[output, T.truncdiv(k * product.bits, const(8, "int32"))])
                shift = T.bitwise_and(k * product.bits, const(7, "int32"))
                code = T.bitwise_and(T.shift_right(byte, shift), const((1 << product.bits) - 1, "int32")) - product.bias
                scale = T.Cast("float32", scales[output, T.truncdiv(k, const(product.group, "int32"))])
                T.buffer_store(weights, T.Cast("float32", code) * scale, [k])
            with T.serial(0, rows) as row:
                sums = T.alloc_buffer((lanes,), "float32", scope="local")
                fill(sums, 0, lanes, "float32", lanes)
                with T.serial(0, product.padded // lanes) as step:
                    at = ramp(step * lanes, lanes)
                    add_to(sums, 0, padded[row, at] * weights[at])
                T.buffer_store(y, total(sums, lanes), [row, output])
    _spread_nan(product, x, y, rows)


def _spread_nan(product: _Product, x: Any, y: Any, rows: Any) -> None:
    """A row of x that holds NaN or Inf gives a row of NaN, whatever the weights beside it are."""
    with T.parallel(0, rows) as row:
        peak = T.alloc_buffer((1,), "int32", scope="local")
        T.buffer_store(peak, const(0, "int32"), [0])
        with T.serial(0, product.k_in) as i:
            bits = T.bitwise_and(T.reinterpret("int32", x[row, i]), const(0x7FFFFFFF, "int32"))
            T.buffer_store(peak, T.max(peak[0], bits), [0])
        with T.If(peak[0] >= INFINITY_BITS), T.Then(), T.serial(0, product.n) as i:
            T.buffer_store(y, const(float("nan"), "float32"), [row, i])
