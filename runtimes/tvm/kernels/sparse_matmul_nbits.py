"""SparseMatMulNBits: selection and group-quantised matrices that share a mask (``qsparse_export.ops``), on a CPU.

Few rows: the activations of up to 128 channels of a group become int16 of the largest of them, so that their products with
the codes add up in integers; a sum becomes a float once per such run. Many rows: a dense float product, tile by tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from qsparse_export.runtimes.tvm.kernels.active_channels import Selection
from qsparse_export.runtimes.tvm.kernels.emit import (
    INFINITY_BITS,
    LINE_BYTES,
    add_to,
    const,
    fill,
    fill_rows,
    prefetch,
    ramp,
    shuffled,
    vector,
)
from qsparse_export.runtimes.tvm.kernels.nbits_gemm import gemm
from qsparse_export.runtimes.tvm.kernels.nbits_product import (
    BLOCK_BYTES,
    RUN_CHANNELS,
    WORDS,
    NbitsProduct,
    selected_row,
    store_row,
)
from qsparse_export.runtimes.tvm.lanes import Lanes
from qsparse_export.runtimes.tvm.tiling import Tiling

GEMM_ROWS = 8
LARGEST_INT16 = 32767.0
SMALLEST_PEAK = 1e-35
"""Below it activations count as zero."""


def sparse_matmul_nbits(
    lanes: Lanes,
    *,
    k_in: int,
    n: Sequence[int],
    k: int,
    block: int,
    rescale: str,
    bits: int,
    group: int,
    tiling: Tiling,
) -> tirx.PrimFunc:
    """(x float32 [M, k_in], w uint8 [k_in, columns * bits / 8], scales float16 [groups, columns], y float32 [M, sum(n)]).

    M is dynamic; ``columns`` is the sum of ``formats.nbits.columns(n)``. Within the bound of the op. Of the
    tiling, only the parts count: they share the columns.
    """
    product = NbitsProduct(lanes, Selection(k_in, k, block, rescale), tuple(n), bits, group, tiling.parts)
    rows = tirx.Var("rows", "int64")
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("sparse_matmul_nbits")
        T.func_attr({"tirx.noalias": True})
        x = T.arg("x", T.buffer((rows, k_in), "float32"))
        w = T.arg("w", T.buffer((k_in, product.bytes), "uint8"))
        scales = T.arg("scales", T.buffer((product.groups, product.columns), "float16"))
        y = T.arg("y", T.buffer((rows, sum(n)), "float32"))
        if not k_in or not sum(n):
            fill_rows(y, rows, sum(n))
        else:
            with T.If(rows < GEMM_ROWS):
                with T.Then(), T.serial(0, rows) as row:
                    _gemv(product, x, w, scales, y, row)
                with T.Else():
                    gemm(product, x, w, scales, y, rows)
    return builder.get()


def _gemv(product: NbitsProduct, x: Any, w: Any, scales: Any, y: Any, row: Any) -> None:
    runs = product.groups * product.runs_per_group
    values = T.alloc_buffer((product.padded,), "float32")
    largest = T.alloc_buffer((1,), "int32")
    room = product.selection.width + runs + 2
    channel = T.alloc_buffer((room,), "int32")
    value = T.alloc_buffer((room,), "int16")
    begins = T.alloc_buffer((runs + 1,), "int32")
    facts = T.alloc_buffer((runs, 2), "float32")
    selected_row(product, x, row, values, largest)
    _list_runs(product, values, channel, value, begins, facts)
    bad = T.bind(largest[0] >= INFINITY_BITS)
    piece = -(-product.blocks // product.parts)
    with T.parallel(0, product.parts) as part:
        first = T.bind(part * piece)
        count = T.bind(T.max(T.min(product.blocks - first, piece), const(0, "int32")))
        sums = T.alloc_buffer((piece * product.block_outputs,), "float32")
        fill(sums, 0, piece * product.block_outputs, "float32", product.lanes.floats)
        with T.serial(0, runs) as run, T.If(begins[run + 1] > begins[run]), T.Then():
            _add_run(product, w, scales, channel, value, begins, facts, run, first, count, sums)
        store_row(product, sums, 0, bad, y, row, first, count)


def _list_runs(product: NbitsProduct, values: Any, channel: Any, value: Any, begins: Any, facts: Any) -> None:
    """The active channels of each run, an even number; ``facts``: the size of an activation's unit, and minus the bias of
    the run's sums, the bits of an int32.
    """
    count = T.alloc_buffer((2,), "int32", scope="local")  # listed so far, sum of activations
    peak = T.alloc_buffer((1,), "float32", scope="local")
    T.buffer_store(count, const(0, "int32"), [0])
    with T.serial(0, product.groups) as group, T.serial(0, product.runs_per_group) as part:
        run = T.bind(group * product.runs_per_group + part)
        start = T.bind(group * product.group + part * RUN_CHANNELS)
        ends = T.min((group + 1) * product.group, const(product.selection.width, "int32"))
        length = T.bind(T.min(ends - start, const(RUN_CHANNELS, "int32")))
        T.buffer_store(begins, count[0], [run])
        T.buffer_store(peak, const(0.0, "float32"), [0])
        T.buffer_store(count, const(0, "int32"), [1])
        with T.serial(0, length) as i:
            T.buffer_store(peak, T.max(peak[0], T.abs(values[start + i])), [0])
        scale = T.bind(const(LARGEST_INT16, "float32") / T.max(peak[0], const(SMALLEST_PEAK, "float32")))
        with T.serial(0, length) as i:
            rounded = T.Cast("int32", T.nearbyint(values[start + i] * scale))
            T.buffer_store(channel, start + i, [count[0]])
            T.buffer_store(value, T.Cast("int16", rounded), [count[0]])
            add_to(count, 1, rounded)
            add_to(count, 0, T.Cast("int32", values[start + i] != const(0.0, "float32")))
        with T.If(T.bitwise_and(count[0] - begins[run], const(1, "int32")) != 0), T.Then():
            T.buffer_store(channel, start, [count[0]])
            T.buffer_store(value, const(0, "int16"), [count[0]])
            add_to(count, 0, const(1, "int32"))
        T.buffer_store(
            facts, T.max(peak[0], const(SMALLEST_PEAK, "float32")) / const(LARGEST_INT16, "float32"), [run, 0]
        )
        T.buffer_store(facts, T.reinterpret("float32", count[1] * const(-product.bias, "int32")), [run, 1])
    T.buffer_store(begins, count[0], [product.groups * product.runs_per_group])
    with T.serial(0, 2) as i:  # what a prefetch looks ahead to
        T.buffer_store(channel, const(0, "int32"), [count[0] + i])


def _add_run(
    product: NbitsProduct,
    w: Any,
    scales: Any,
    channel: Any,
    value: Any,
    begins: Any,
    facts: Any,
    run: Any,
    first: Any,
    count: Any,
    sums: Any,
) -> None:
    begin, end = T.bind(begins[run]), T.bind(begins[run + 1])
    group = T.bind(T.truncdiv(run, const(product.runs_per_group, "int32")))
    last = T.bind(begins[product.groups * product.runs_per_group])
    with T.serial(0, count) as block:
        column = T.bind((first + block) * BLOCK_BYTES)
        turn = T.bind(T.bitwise_and(block, const(1, "int32")))
        part = T.alloc_buffer((product.planes * WORDS,), "int32", scope="local")
        for i in range(product.planes):
            T.buffer_store(part, vector(0, "int32", WORDS), [ramp(i * WORDS, WORDS)])
        with T.serial(0, T.shift_right(end - begin, const(1, "int32"))) as pair:
            at = T.bind(begin + 2 * pair)
            ahead = T.bind(T.min(at + turn + (end - begin), last))
            prefetch(w, [channel[at + turn], column + LINE_BYTES], 3)
            prefetch(w, [channel[ahead], column], 2)
            rows = [
                T.bind(
                    T.bitwise_xor(
                        T.reinterpret(f"int32x{WORDS}", w.vload([channel[at + j], column], f"uint8x{BLOCK_BYTES}")),
                        vector(product.biases, "int32", WORDS),
                    )
                )
                for j in range(2)
            ]
            add = _add_pair if product.lanes.pair_product else _add_channels
            add(product, rows, value, at, part)
        unit = T.bind(facts[run, 0])
        bias = T.bind(T.reinterpret("int32", facts[run, 1]))
        for i in range(product.planes):
            output = block * product.block_outputs + i * WORDS
            scale = T.Cast(
                f"float32x{WORDS}", scales[group, ramp((first + block) * product.block_outputs + i * WORDS, WORDS)]
            )
            total = T.Cast(f"float32x{WORDS}", part[ramp(i * WORDS, WORDS)] + vector(bias, "int32", WORDS))
            add_to(sums, output, total * (scale * vector(unit, "float32", WORDS)))


def _add_pair(product: NbitsProduct, rows: list[Any], value: Any, at: Any, part: Any) -> None:
    """Both channels' codes side by side in 16-bit lanes, times their activations: lanes of two products' sums."""
    halves = [T.reinterpret(f"int16x{2 * WORDS}", row) for row in rows]
    given = T.reinterpret("int32", value[ramp(at, 2)])
    activations = T.bind(T.reinterpret(f"int16x{2 * WORDS}", T.Broadcast(given, WORDS)))
    mask = (1 << product.bits) - 1
    per_half = product.planes // 2
    for half in range(2):
        order = [lane for word in range(WORDS) for lane in (2 * word + half, 2 * WORDS + 2 * word + half)]
        codes = T.bind(T.reinterpret(f"uint16x{2 * WORDS}", shuffled(halves, order)))
        for i in range(per_half):
            shift = vector(product.bits * i, "uint16", 2 * WORDS)
            plane = T.bitwise_and(T.shift_right(codes, shift), vector(mask, "uint16", 2 * WORDS))
            where = ramp((half * per_half + i) * WORDS, WORDS)
            products = T.call_llvm_pure_intrin(
                f"int32x{WORDS}",
                product.lanes.pair_product,
                T.reinterpret(f"int16x{2 * WORDS}", plane),
                activations,
            )
            T.buffer_store(part, part[where] + products, [where])


def _add_channels(product: NbitsProduct, rows: list[Any], value: Any, at: Any, part: Any) -> None:
    mask = (1 << product.bits) - 1
    for j, row in enumerate(rows):
        words = T.reinterpret(f"uint32x{WORDS}", row)
        activation = T.bind(T.Cast("int32", value[at + j]))
        for i in range(product.planes):
            shift = vector(product.bits * i, "uint32", WORDS)
            plane = T.bitwise_and(T.shift_right(words, shift), vector(mask, "uint32", WORDS))
            where = ramp(i * WORDS, WORDS)
            products = T.Cast(f"int32x{WORDS}", plane) * vector(activation, "int32", WORDS)
            T.buffer_store(part, part[where] + products, [where])
