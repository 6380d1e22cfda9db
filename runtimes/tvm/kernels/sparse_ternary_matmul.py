"""SparseTernaryMatMul: selection, quantiser and ternary matrices that share a mask (``qsparse_export.ops``), on a CPU.

Few rows: each reads the weight rows of its active channels, some side by side, as pieces that are as long as they can be:
out of memory the order of access matters more than the arithmetic. Many rows: a dense product, unpacked tile by tile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from qsparse_export.formats.ternary import row_bytes
from qsparse_export.runtimes.tvm.kernels import ternary_codes as codes
from qsparse_export.runtimes.tvm.kernels.active_channels import TILE_CHANNELS, Selection, load_row, mask, quantize
from qsparse_export.runtimes.tvm.kernels.emit import LINE_BYTES, add_to, const, fill, fill_rows, prefetch, ramp, vector
from qsparse_export.runtimes.tvm.lanes import Lanes
from qsparse_export.runtimes.tvm.tiling import Tiling

GEMM_ROWS = 8
"""From so many rows on the product is dense."""
ROWS_AT_ONCE = 4


@dataclass(frozen=True)
class _Product:
    """The sizes of one node. ``widths`` and ``n``: row bytes and outputs of each matrix."""

    lanes: Lanes
    selection: Selection
    n: tuple[int, ...]
    tiling: Tiling

    @property
    def widths(self) -> list[int]:
        return [row_bytes(outputs) for outputs in self.n]

    @property
    def bytes(self) -> int:
        return sum(self.widths)

    @property
    def blocks(self) -> int:
        return self.bytes // self.lanes.vector_bytes

    @property
    def block_sums(self) -> int:
        return codes.PLANES * self.lanes.vector_bytes

    @property
    def padded(self) -> int:
        return self.selection.padded(self.lanes.floats)


def sparse_ternary_matmul(
    lanes: Lanes, *, k_in: int, n: Sequence[int], k: int, block: int, rescale: str, tiling: Tiling
) -> tirx.PrimFunc:
    """(x float32 [M, k_in], w uint8 [k_in, sum of row_bytes(n)], scales float32 [len(n)], y float32 [M, sum(n)]), M dynamic.

    The integer part and the result are the reference's bits.
    """
    product = _Product(lanes, Selection(k_in, k, block, rescale), tuple(n), tiling)
    rows = tirx.Var("rows", "int64")
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("sparse_ternary_matmul")
        T.func_attr({"tirx.noalias": True})
        x = T.arg("x", T.buffer((rows, k_in), "float32"))
        w = T.arg("w", T.buffer((k_in, product.bytes), "uint8"))
        scales = T.arg("scales", T.buffer((len(n),), "float32"))
        y = T.arg("y", T.buffer((rows, sum(n)), "float32"))
        if k_in and sum(n):
            with T.If(rows < GEMM_ROWS):
                with T.Then(), T.serial(0, rows) as row:
                    _gemv(product, x, w, scales, y, row)
                with T.Else():
                    _gemm(product, x, w, scales, y, rows)
        else:
            fill_rows(y, rows, sum(n))
    return builder.get()


def _quantized_row(product: _Product, x: Any, row: Any, q: Any, facts: Any) -> None:
    lanes, selection, padded = product.lanes.floats, product.selection, product.padded
    values = T.alloc_buffer((padded,), "float32")
    largest = T.alloc_buffer((1,), "int32", scope="local")
    load_row(x, row, selection.width, lanes, values, padded)
    mask(selection, lanes, values, largest)
    quantize(padded, lanes, values, largest, q, facts)


def _gemv(product: _Product, x: Any, w: Any, scales: Any, y: Any, row: Any) -> None:
    room = product.padded + 2 * product.tiling.rows
    q = T.alloc_buffer((product.padded,), "int8")
    channel = T.alloc_buffer((room,), "int32")
    value = T.alloc_buffer((room,), "int8")
    facts = T.alloc_buffer((2,), "float32")
    groups = T.alloc_buffer((1,), "int32")
    _quantized_row(product, x, row, q, facts)
    _list_active(product, q, channel, value, groups)
    if product.tiling.columns:
        piece = -(-product.blocks // product.tiling.parts)
        with T.parallel(0, product.tiling.parts) as part:
            sums = T.alloc_buffer((piece * product.block_sums,), "int32")
            first = part * piece
            count = T.bind(T.max(T.min(product.blocks - first, piece), const(0, "int32")))
            fill(sums, 0, piece * product.block_sums, "int32", product.lanes.floats)
            with T.serial(0, groups[0]) as group:
                _add_group(product, w, channel, value, group, first, count, sums, 0)
            _finish(product, sums, [0], facts, scales, y, row, first, count)
        return
    sums = T.alloc_buffer((product.tiling.parts * product.blocks * product.block_sums,), "int32")
    with T.parallel(0, product.tiling.parts) as part:
        start = T.bind(part * (product.blocks * product.block_sums))
        fill(sums, start, product.blocks * product.block_sums, "int32", product.lanes.floats)
        share = T.bind(T.truncdiv(groups[0] + product.tiling.parts - 1, const(product.tiling.parts, "int32")))
        begin = T.bind(part * share)
        with T.serial(0, T.max(T.min(share, groups[0] - begin), const(0, "int32"))) as group:
            _add_group(product, w, channel, value, begin + group, 0, product.blocks, sums, start)
    starts = [part * product.blocks * product.block_sums for part in range(product.tiling.parts)]
    _finish(product, sums, starts, facts, scales, y, row, 0, product.blocks)


def _list_active(product: _Product, q: Any, channel: Any, value: Any, groups: Any) -> None:
    """The channels whose activation is not 0, in order, then two groups of channel 0 with an activation of 0."""
    group = product.tiling.rows
    count = T.alloc_buffer((1,), "int32", scope="local")
    T.buffer_store(count, const(0, "int32"), [0])
    with T.serial(0, product.selection.width) as i:
        T.buffer_store(channel, i, [count[0]])
        T.buffer_store(value, q[i], [count[0]])
        add_to(count, 0, T.Cast("int32", q[i] != const(0, "int8")))
    with T.serial(0, 2 * group) as i:
        T.buffer_store(channel, const(0, "int32"), [count[0] + i])
        T.buffer_store(value, const(0, "int8"), [count[0] + i])
    T.buffer_store(groups, T.truncdiv(count[0] + group - 1, const(group, "int32")), [0])


def _add_group(
    product: _Product, w: Any, channel: Any, value: Any, group: Any, first: Any, blocks: Any, sums: Any, start: Any
) -> None:
    """Adds the products of one group's rows with ``blocks`` blocks from ``first`` to the sums from ``start``."""
    lanes, step = product.lanes, product.lanes.ternary.channels
    size, count = lanes.vector_bytes, codes.sum_lanes(product.lanes)
    with T.serial(0, blocks) as block:
        column = T.bind((first + block) * size)
        sets = step * codes.PLANES
        per_line = min(LINE_BYTES // size, step)
        turn = T.bind(T.bitwise_and(block, per_line - 1))
        part = T.alloc_buffer((sets * count,), lanes.ternary.sum_dtype, scope="local")
        for i in range(sets):
            T.buffer_store(part, codes.zeros(lanes), [ramp(i * count, count)])
        with T.serial(0, product.tiling.rows // step) as i:
            at = T.bind(group * product.tiling.rows + i * step)
            rows = []
            for j in range(step):
                rows.append(T.bind(w.vload([channel[at + j], column], f"uint8x{size}")))
            for j in range(0, step, per_line):  # a line is asked for once: the blocks in it share the rows of a step
                ahead = T.bind(at + j + turn)
                prefetch(w, [channel[ahead], column + LINE_BYTES], 3)
                prefetch(w, [channel[ahead + product.tiling.rows], column], 2)
            values = T.bind(codes.activations(lanes, value, at))
            for h, bytes_ in enumerate(codes.interleaved(lanes, rows)):
                for p in range(codes.PLANES):
                    where = ramp((h * codes.PLANES + p) * count, count)
                    more = codes.multiply_add(lanes, part[where], codes.plane(lanes, bytes_, p), values)
                    T.buffer_store(part, more, [where])
        for i in range(sets):
            wide = T.Cast(f"int32x{count}", part[ramp(i * count, count)])
            add_to(sums, start + block * product.block_sums + i * count, wide)


def _finish(
    product: _Product,
    sums: Any,
    starts: list[int],
    facts: Any,
    scales: Any,
    y: Any,
    row: Any,
    first: Any,
    blocks: Any,
) -> None:
    """Writes the outputs of ``blocks`` blocks from ``first``: the sums at each of ``starts``, added up and scaled."""
    size = product.lanes.vector_bytes
    offset = T.bind(T.reinterpret("int32", facts[1]))
    begin = outputs_before = 0
    for matrix, (width, outputs) in enumerate(zip(product.widths, product.n, strict=True)):
        last = begin + width // size
        factor = T.bind(facts[0] * scales[matrix])
        low = T.bind(T.max(first, const(begin, "int32")))
        high = T.bind(T.min(first + blocks, const(last, "int32")))
        with T.serial(0, T.max(high - low, const(0, "int32"))) as i:
            block = T.bind(low + i)
            source = T.bind((block - first) * product.block_sums)

            def scaled(at: Any, count: int, source: Any = source, factor: Any = factor) -> Any:
                value = None
                for start in starts:
                    where = ramp(start + source + at, count)
                    value = sums[where] if value is None else value + sums[where]
                return T.Cast(f"float32x{count}", value - vector(offset, "int32", count)) * vector(
                    factor, "float32", count
                )

            _store_block(product, scaled, y, row, outputs_before, outputs, (block - begin) * product.block_sums)
        begin, outputs_before = last, outputs_before + outputs


def _store_block(
    product: _Product, values: Callable[..., Any], y: Any, row: Any, before: int, outputs: int, output: Any
) -> None:
    """The values of one block to y[row, before + output:], as far as the matrix has ``outputs``."""
    parts = codes.natural_order(product.lanes, values)
    part = len(parts) and product.block_sums // len(parts)
    with T.If(output + product.block_sums <= outputs):
        with T.Then():
            for at, part_values in parts:
                T.buffer_store(y, part_values, [row, ramp(before + output + at, part)])
        with T.Else():
            rest = T.alloc_buffer((product.block_sums,), "float32", scope="local")
            for at, part_values in parts:
                T.buffer_store(rest, part_values, [ramp(at, part)])
            with T.serial(0, T.min(outputs - output, product.block_sums)) as i:
                T.buffer_store(y, rest[i], [row, before + output + i])


def _gemm(product: _Product, x: Any, w: Any, scales: Any, y: Any, rows: Any) -> None:
    q = T.alloc_buffer((rows, product.padded), "int8")
    facts = T.alloc_buffer((rows, 2), "float32")
    with T.parallel(0, rows) as row:
        own = T.alloc_buffer((product.padded,), "int8")
        own_facts = T.alloc_buffer((2,), "float32", scope="local")
        _quantized_row(product, x, row, own, own_facts)
        step = product.lanes.floats
        with T.serial(0, product.padded // step) as i:
            T.buffer_store(q, own[ramp(i * step, step)], [row, ramp(i * step, step)])
        for i in range(2):
            T.buffer_store(facts, own_facts[i], [row, i])
    with T.parallel(0, product.blocks) as block:
        sums = T.alloc_buffer((rows * product.block_sums,), "int32")
        with T.serial(0, rows * (product.block_sums // product.lanes.floats)) as i:
            T.buffer_store(
                sums, vector(0, "int32", product.lanes.floats), [ramp(i * product.lanes.floats, product.lanes.floats)]
            )
        tile = T.alloc_buffer((TILE_CHANNELS * product.block_sums,), "uint8")
        with T.serial(0, -(-product.selection.width // TILE_CHANNELS)) as t:
            _unpack_tile(product, w, t * TILE_CHANNELS, block * product.lanes.vector_bytes, tile)
            _multiply_tile(product, tile, q, t * TILE_CHANNELS, rows, sums)
        with T.serial(0, rows) as row:
            own_facts = T.alloc_buffer((2,), "float32", scope="local")
            for i in range(2):
                T.buffer_store(own_facts, facts[row, i], [i])
            shifted = T.decl_buffer((product.block_sums,), "int32", sums.data, elem_offset=row * product.block_sums)
            _finish(product, shifted, [0], own_facts, scales, y, row, block, 1)


def _unpack_tile(product: _Product, w: Any, channel: Any, column: Any, tile: Any) -> None:
    """The codes of TILE_CHANNELS channels and one block as [h][p][step of channels][vector]; none beyond the last channel."""
    lanes, step, size = product.lanes, product.lanes.ternary.channels, product.lanes.vector_bytes
    steps = TILE_CHANNELS // step
    with T.serial(0, steps) as i:
        rows = []
        for j in range(step):
            at = T.min(channel + i * step + j, const(product.selection.width - 1, "int32"))  # q is 0 beyond
            rows.append(T.bind(w.vload([at, column], f"uint8x{size}")))
        for h, bytes_ in enumerate(codes.interleaved(lanes, rows)):
            for p in range(codes.PLANES):
                place = ((h * codes.PLANES + p) * steps + i) * size
                T.buffer_store(tile, codes.plane(lanes, bytes_, p), [ramp(place, size)])


def _multiply_tile(product: _Product, tile: Any, q: Any, channel: Any, rows: Any, sums: Any) -> None:
    lanes, step, size = product.lanes, product.lanes.ternary.channels, product.lanes.vector_bytes
    steps, count = TILE_CHANNELS // step, codes.sum_lanes(product.lanes)

    def multiply(row: Any, at_once: int) -> None:
        with T.serial(0, step * codes.PLANES) as panel:
            part = T.alloc_buffer((at_once * count,), lanes.ternary.sum_dtype, scope="local")
            for r in range(at_once):
                T.buffer_store(part, codes.zeros(lanes), [ramp(r * count, count)])
            with T.serial(0, steps) as i:
                given = T.bind(tile[ramp((panel * steps + i) * size, size)])
                for r in range(at_once):
                    word = q[row + r, ramp(channel + i * step, step)] if step > 1 else q[row + r, channel + i]
                    values = codes.spread(lanes, word)
                    where = ramp(r * count, count)
                    T.buffer_store(part, codes.multiply_add(lanes, part[where], given, values), [where])
            for r in range(at_once):
                wide = T.Cast(f"int32x{count}", part[ramp(r * count, count)])
                add_to(sums, (row + r) * product.block_sums + panel * count, wide)

    whole = T.bind(T.truncdiv(rows, const(ROWS_AT_ONCE, "int64")))
    with T.serial(0, whole) as i:
        multiply(i * ROWS_AT_ONCE, ROWS_AT_ONCE)
    with T.serial(0, rows - whole * ROWS_AT_ONCE) as i:
        multiply(whole * ROWS_AT_ONCE + i, 1)
