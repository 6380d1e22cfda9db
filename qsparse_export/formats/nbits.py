"""Group-quantised 4- and 8-bit weights: two layouts, one for layers whose channels are skipped, one for the head.

A weight is ``code * scale``: the code a signed integer of ``bits`` bits, the scale a float16 that the ``group`` consecutive
input channels of one output share (the last group may be shorter). See docs/adr/n-bit-groups-along-the-inputs.md.

*Channel-major*, int8 or int4 [K, columns(N)]: row k holds input channel k for every output, so that an inactive channel is
bytes not read. A row is a sequence of 32-bit little-endian words; 8 words hold ``8 * 32 / bits`` outputs, and the codes of
a word are its planes: plane i (the bits ``bits * i`` and up) of word j is output ``8 * i + j`` of those. So one mask gives
eight consecutive outputs at a time. N is padded to a multiple of 64 outputs with zeros. Columns are numbered as ONNX
unpacks them (lowest bits first): column ``32 / bits * j + i`` holds output ``8 * i + j``. Scales are float16
[groups, columns(N)] in the order of the outputs.

*Output-major*, uint8 [N, K * bits / 8]: row n holds the inputs of output n in order, lowest bits first, as codes plus
``2 ** (bits - 1)``, K padded to whole bytes with zero weights; scales float16 [N, groups].
"""

from __future__ import annotations

import numpy as np

TILE_OUTPUTS = 64
WORDS = 8
BITS = (4, 8)


def columns(n: int) -> int:
    """Outputs of a channel-major row with padding."""
    return -(-n // TILE_OUTPUTS) * TILE_OUTPUTS


def group_count(k: int, group: int) -> int:
    """Groups of ``group`` input channels, the last one possibly shorter."""
    return -(-k // group)


def column_of_output(n: int, bits: int) -> np.ndarray:
    """int64 [n]: the column in which a channel-major row keeps each output."""
    planes = 32 // bits
    output = np.arange(n)
    tile, within = np.divmod(output, WORDS * planes)
    plane, word = np.divmod(within, WORDS)
    return tile * WORDS * planes + word * planes + plane


def pack_channels(codes: np.ndarray, bits: int) -> np.ndarray:
    """int8 [N, K] of codes to channel-major uint8 [K, columns(N) * bits / 8]; ValueError for a code out of range."""
    _check(codes, bits)
    n, k = codes.shape
    padded = np.zeros((k, columns(n)), np.int8)
    padded[:, column_of_output(n, bits)] = codes.T
    if bits == 8:
        return padded.view(np.uint8)
    nibbles = padded.view(np.uint8) & 15
    return nibbles[:, 0::2] | nibbles[:, 1::2] << 4


def unpack_channels(packed: np.ndarray, n: int, bits: int) -> np.ndarray:
    """Channel-major uint8 [K, columns(N) * bits / 8] to int8 [N, K]; ValueError when the row length does not fit ``n``."""
    if packed.ndim != 2 or packed.shape[1] * 8 != columns(n) * bits:
        raise ValueError(
            f"weights are {list(packed.shape)}; {n} outputs of {bits} bits take rows of {columns(n) * bits // 8}"
        )
    return np.ascontiguousarray(_codes(packed, bits)[:, column_of_output(n, bits)].T)


def _codes(packed: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return packed.view(np.int8)
    nibbles = np.stack((packed & 15, packed >> 4), axis=-1).reshape(len(packed), 2 * packed.shape[1])
    return (nibbles ^ 8).astype(np.int8) - 8


def output_row_bytes(k: int, bits: int) -> int:
    """Bytes of an output-major row of ``k`` inputs."""
    return -(-k * bits // 8)


def pack_outputs(codes: np.ndarray, bits: int) -> np.ndarray:
    """int8 [N, K] of codes to output-major uint8 [N, output_row_bytes(K)]; ValueError for a code out of range."""
    _check(codes, bits)
    unsigned = (codes.astype(np.int16) + (1 << bits - 1)).astype(np.uint8)
    if bits == 8:
        return unsigned
    if unsigned.shape[1] % 2:
        unsigned = np.pad(unsigned, ((0, 0), (0, 1)), constant_values=8)
    return unsigned[:, 0::2] | unsigned[:, 1::2] << 4


def unpack_outputs(packed: np.ndarray, k: int, bits: int) -> np.ndarray:
    """Output-major uint8 [N, output_row_bytes(K)] to int8 [N, K]; ValueError when the row length does not fit ``k``."""
    if packed.ndim != 2 or packed.shape[1] != output_row_bytes(k, bits):
        raise ValueError(
            f"weights are {list(packed.shape)}; {k} inputs of {bits} bits take {output_row_bytes(k, bits)} bytes"
        )
    if bits == 8:
        return (packed ^ 128).view(np.int8)
    nibbles = np.stack((packed & 15, packed >> 4), axis=-1).reshape(len(packed), 2 * packed.shape[1])[:, :k]
    return nibbles.astype(np.int8) - 8


def _check(codes: np.ndarray, bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"{bits} bits; expected 4 or 8")
    limit = 1 << bits - 1
    if codes.size and (codes.min() < -limit or codes.max() >= limit):
        raise ValueError(f"codes from {codes.min()} to {codes.max()}; {bits} bits hold {-limit}..{limit - 1}")
