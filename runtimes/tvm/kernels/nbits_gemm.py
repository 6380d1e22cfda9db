"""Many rows times group-quantised matrices: the weights unpacked to float32, tile by tile."""

from __future__ import annotations

from typing import Any

from tvm.tirx.script.builder import ir as T

from qsparse_export.runtimes.tvm.kernels.active_channels import TILE_CHANNELS
from qsparse_export.runtimes.tvm.kernels.emit import INFINITY_BITS, add_to, const, ramp, vector
from qsparse_export.runtimes.tvm.kernels.nbits_product import BLOCK_BYTES, WORDS, NbitsProduct, selected_row, store_row

ROWS_AT_ONCE = 4


def gemm(product: NbitsProduct, x: Any, w: Any, scales: Any, y: Any, rows: Any) -> None:
    """y = the rows of x, masked, times the matrices."""
    values = T.alloc_buffer((rows, product.padded), "float32")
    bad = T.alloc_buffer((rows,), "int32")
    step = product.lanes.floats
    with T.parallel(0, rows) as row:
        own = T.alloc_buffer((product.padded,), "float32")
        largest = T.alloc_buffer((1,), "int32", scope="local")
        selected_row(product, x, row, own, largest)
        with T.serial(0, product.padded // step) as i:
            T.buffer_store(values, own[ramp(i * step, step)], [row, ramp(i * step, step)])
        T.buffer_store(bad, largest[0], [row])
    with T.parallel(0, product.blocks) as block:
        sums = T.alloc_buffer((rows * product.block_outputs,), "float32")
        with T.serial(0, rows * (product.block_outputs // step)) as i:
            T.buffer_store(sums, vector(0.0, "float32", step), [ramp(i * step, step)])
        tile = T.alloc_buffer((TILE_CHANNELS * product.block_outputs,), "float32")
        with T.serial(0, -(-product.selection.width // TILE_CHANNELS)) as t:
            _unpack_tile(product, w, scales, t * TILE_CHANNELS, block, tile)
            _multiply_tile(product, tile, values, t * TILE_CHANNELS, rows, sums)
        with T.serial(0, rows) as row:
            start = row * product.block_outputs
            store_row(product, sums, start, bad[row] >= INFINITY_BITS, y, row, block, 1)


def _unpack_tile(product: NbitsProduct, w: Any, scales: Any, first: Any, block: Any, tile: Any) -> None:
    """float32 weights [plane][channel][word] of TILE_CHANNELS channels and one block."""
    with T.serial(0, TILE_CHANNELS) as i:
        channel = T.bind(T.min(first + i, const(product.selection.width - 1, "int32")))  # activations are 0 beyond
        group = T.truncdiv(channel, const(product.group, "int32"))
        words = T.bind(T.reinterpret(f"int32x{WORDS}", w.vload([channel, block * BLOCK_BYTES], f"uint8x{BLOCK_BYTES}")))
        for p in range(product.planes):
            up = vector(32 - product.bits * (p + 1), "int32", WORDS)
            down = vector(32 - product.bits, "int32", WORDS)
            code = T.shift_right(T.shift_left(words, up), down)  # arithmetic: the sign comes along
            scale = scales[group, ramp(block * product.block_outputs + p * WORDS, WORDS)]
            weight = T.Cast(f"float32x{WORDS}", code) * T.Cast(f"float32x{WORDS}", scale)
            T.buffer_store(tile, weight, [ramp((p * TILE_CHANNELS + i) * WORDS, WORDS)])


def _multiply_tile(product: NbitsProduct, tile: Any, values: Any, first: Any, rows: Any, sums: Any) -> None:
    def multiply(row: Any, at_once: int) -> None:
        with T.serial(0, product.planes // 2) as pair:
            part = T.alloc_buffer((2 * at_once * WORDS,), "float32", scope="local")
            for i in range(2 * at_once):
                T.buffer_store(part, vector(0.0, "float32", WORDS), [ramp(i * WORDS, WORDS)])
            with T.serial(0, TILE_CHANNELS) as channel:
                weights = [
                    T.bind(tile[ramp(((2 * pair + j) * TILE_CHANNELS + channel) * WORDS, WORDS)]) for j in range(2)
                ]
                for r in range(at_once):
                    given = T.bind(vector(values[row + r, first + channel], "float32", WORDS))
                    for j in range(2):
                        where = ramp((2 * r + j) * WORDS, WORDS)
                        T.buffer_store(part, part[where] + given * weights[j], [where])
            for r in range(at_once):
                for j in range(2):
                    output = (row + r) * product.block_outputs + (2 * pair + j) * WORDS
                    add_to(sums, output, part[ramp((2 * r + j) * WORDS, WORDS)])

    whole = T.bind(T.truncdiv(rows, const(ROWS_AT_ONCE, "int64")))
    with T.serial(0, whole) as i:
        multiply(i * ROWS_AT_ONCE, ROWS_AT_ONCE)
    with T.serial(0, rows - whole * ROWS_AT_ONCE) as i:
        multiply(whole * ROWS_AT_ONCE + i, 1)
