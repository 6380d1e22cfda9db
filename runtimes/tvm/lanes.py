"""Lanes: what the kernels of :mod:`~qsparse_export.runtimes.tvm.kernels` need to know of an instruction set."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DotProduct:
    """Unsigned codes of 0..2 times int8 activations, of ``channels`` neighbouring bytes, added up in one lane.

    ``intrinsic`` is LLVM's name; "" multiplies and adds in plain vector code. ``accumulates``: the sum so far is its first
    operand. A lane of ``sum_dtype`` holds the sums of 64 channels, which is as many as the kernels add up in one: a product
    is at most 2 * 128 in magnitude, and 64 * 256 = 16384.
    """

    intrinsic: str
    channels: int
    sum_dtype: str
    accumulates: bool
    codes_dtype: str


@dataclass(frozen=True)
class Lanes:
    """One instruction set: the widths of its vectors in elements, and its products of small integers.

    ``pair_product`` is LLVM's name of the product of int16 vectors whose neighbouring pairs add up to int32, "" where there
    is none and the kernels multiply int32 lanes.
    """

    name: str
    vector_bytes: int
    ternary: DotProduct
    pair_product: str

    @property
    def floats(self) -> int:
        """float32 or int32 values of a vector."""
        return self.vector_bytes // 4


_MADDUBS = DotProduct("llvm.x86.avx2.pmadd.ub.sw", 2, "int16", False, "uint8")
_VPDPBUSD = DotProduct("llvm.x86.avx512.vpdpbusd.256", 4, "int32", True, "uint8")
_SDOT = DotProduct("llvm.aarch64.neon.sdot.v4i32.v16i8", 4, "int32", True, "int8")
_PLAIN = DotProduct("", 1, "int16", False, "uint8")

GENERIC = Lanes("generic", 16, _PLAIN, "")
AVX2 = Lanes("avx2", 32, _MADDUBS, "llvm.x86.avx2.pmadd.wd")
AVX512_VNNI = Lanes("avx512vnni", 32, _VPDPBUSD, "llvm.x86.avx2.pmadd.wd")
NEON = Lanes("neon", 16, _PLAIN, "")
NEON_DOT = Lanes("neondot", 16, _SDOT, "")
