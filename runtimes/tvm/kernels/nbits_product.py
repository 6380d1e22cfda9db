"""The sizes of a product with group-quantised matrices, and what its few-row and many-row halves share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from qsparse_export.formats import nbits
from qsparse_export.runtimes.tvm.kernels.active_channels import Selection, finite, load_row, mask
from qsparse_export.runtimes.tvm.kernels.emit import const, ramp
from qsparse_export.runtimes.tvm.lanes import Lanes

RUN_CHANNELS = 128
"""Products of so many unsigned 8-bit codes and int16 activations add up in int32."""
WORDS = nbits.WORDS
BLOCK_BYTES = 4 * WORDS


@dataclass(frozen=True)
class NbitsProduct:
    """The sizes of one node; ``parts`` work side by side, each on its own columns."""

    lanes: Lanes
    selection: Selection
    n: tuple[int, ...]
    bits: int
    group: int
    parts: int

    @property
    def columns(self) -> int:
        """Outputs of a weight row, with padding."""
        return sum(nbits.columns(outputs) for outputs in self.n)

    @property
    def bytes(self) -> int:
        """Of a weight row."""
        return self.columns * self.bits // 8

    @property
    def planes(self) -> int:
        """Codes of a 32-bit word."""
        return 32 // self.bits

    @property
    def block_outputs(self) -> int:
        """Outputs of a block of 8 words."""
        return WORDS * self.planes

    @property
    def blocks(self) -> int:
        """Blocks of a weight row."""
        return self.bytes // BLOCK_BYTES

    @property
    def groups(self) -> int:
        """Groups of channels that share scales."""
        return nbits.group_count(self.selection.width, self.group)

    @property
    def runs_per_group(self) -> int:
        """Pieces of a group whose products add up in integers."""
        return -(-min(self.group, self.selection.width) // RUN_CHANNELS)

    @property
    def padded(self) -> int:
        """Channels of a masked row, with padding."""
        return self.selection.padded(self.lanes.floats)

    @property
    def bias(self) -> int:
        """What makes a signed code unsigned."""
        return 1 << self.bits - 1

    @property
    def biases(self) -> int:
        """The bit to flip in each code of a word, for that: an int32 pattern."""
        pattern = int.from_bytes(bytes([0x88 if self.bits == 4 else 0x80] * 4), "little")
        return pattern - (1 << 32)


def selected_row(product: NbitsProduct, x: Any, row: Any, values: Any, largest: Any) -> None:
    """``values`` = the masked row of x, NaN and Inf as 0; ``largest`` as :func:`~.active_channels.mask` has it."""
    lanes, padded = product.lanes.floats, product.padded
    load_row(x, row, product.selection.width, lanes, values, padded)
    mask(product.selection, lanes, values, largest)
    with T.serial(0, padded // lanes) as i:
        at = ramp(i * lanes, lanes)
        T.buffer_store(values, finite(values[at], lanes), [at])


def store_row(product: NbitsProduct, sums: Any, start: Any, bad: Any, y: Any, row: Any, first: Any, count: Any) -> None:
    """sums[start:] of ``count`` blocks from ``first``, without padding, to y[row]; NaN where ``bad``."""
    begin = outputs_before = 0
    for outputs in product.n:
        last = begin + nbits.columns(outputs)
        low = T.bind(T.max(first * product.block_outputs, const(begin, "int32")))
        high = T.bind(T.min((first + count) * product.block_outputs, const(begin + outputs, "int32")))
        with T.serial(0, T.max(high - low, const(0, "int32"))) as i:
            value = sums[start + low - first * product.block_outputs + i]
            kept = T.Select(bad, const(float("nan"), "float32"), value)
            T.buffer_store(y, kept, [row, outputs_before + low - begin + i])
        begin, outputs_before = last, outputs_before + outputs
