"""Packed weights and scales as words: what the kernels of the embedding and the head read of output-major rows."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from qsparse_export.errors import UsageError
from qsparse_export.formats import nbits
from qsparse_export.runtimes.tvm.gpu.float_bits import half_to_float

WORD_BYTES = 4
_WORD_SCALES = 2


@dataclass(frozen=True)
class OutputMajor:
    """Codes of ``bits`` bits, rows of ``k`` inputs, and a scale for each ``group`` of them (``formats.nbits``).

    A row is uint32 words, or uint8 where it does not end with a whole word; scales are the bits of their float16, likewise
    words of two or, of an odd number, uint16: OpenCL and WebGPU need not have the type, and WebGPU has words alone.
    """

    k: int
    bits: int
    group: int

    def __post_init__(self) -> None:
        if self.bits not in nbits.BITS or self.group < 1:
            raise UsageError(f"{self.bits} bits in groups of {self.group}; expected 4 or 8 bits and a positive group")

    @property
    def dtype(self) -> str:
        """Of what a row is made of."""
        return "uint8" if nbits.output_row_bytes(self.k, self.bits) % WORD_BYTES else "uint32"

    @property
    def unit_codes(self) -> int:
        """Codes of a word, or of a byte where that is what a row is made of: they share a scale."""
        return (8 if self.dtype == "uint8" else 8 * WORD_BYTES) // self.bits

    @property
    def units(self) -> int:
        """Words or bytes of a row."""
        return -(-self.k // self.unit_codes)

    @property
    def groups(self) -> int:
        """Scales of a row."""
        return nbits.group_count(self.k, self.group)

    @property
    def scale_dtype(self) -> str:
        """Of what the scales of a row are made of."""
        return "uint16" if self.groups % _WORD_SCALES else "uint32"

    @property
    def scale_units(self) -> int:
        """Words or halves of a row of scales."""
        return self.groups if self.groups % _WORD_SCALES else self.groups // _WORD_SCALES

    def code(self, unit: tirx.Expr, place: tirx.Expr | int) -> tirx.Expr:
        """int32: the code at ``place`` of a word or byte (uint32), signed."""
        shift = T.Cast("uint32", place * self.bits) if isinstance(place, tirx.Expr) else T.uint32(place * self.bits)
        return T.Cast("int32", unit >> shift & T.uint32((1 << self.bits) - 1)) - (1 << self.bits - 1)

    def scale(self, scales: tirx.Buffer, row: tirx.Expr, channel: tirx.Expr) -> tirx.Expr:
        """float32: of a channel, or of the last one for the padding behind it."""
        number = T.min(channel // self.group, self.groups - 1)
        if self.scale_dtype == "uint16":
            return half_to_float(T.bind(T.Cast("uint32", scales[row, number])))
        shift = T.Cast("uint32", number % _WORD_SCALES * 16)
        return half_to_float(T.bind(scales[row, number // _WORD_SCALES] >> shift))
