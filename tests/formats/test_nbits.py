from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsparse_export.formats import nbits

BITS = st.sampled_from([4, 8])
SIZE = st.integers(0, 140)


def codes_of(n: int, k: int, bits: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-(1 << bits - 1), 1 << bits - 1, (n, k)).astype(np.int8)


@given(SIZE, st.integers(0, 9), BITS, st.integers(0, 99))
def test_property_channel_major_unpacks_to_what_was_packed(n, k, bits, seed):
    codes = codes_of(n, k, bits, seed)
    packed = nbits.pack_channels(codes, bits)
    assert packed.dtype == np.uint8 and packed.shape == (k, nbits.columns(n) * bits // 8)
    np.testing.assert_array_equal(nbits.unpack_channels(packed, n, bits), codes)


@given(st.integers(0, 9), SIZE, BITS, st.integers(0, 99))
def test_property_output_major_unpacks_to_what_was_packed(n, k, bits, seed):
    codes = codes_of(n, k, bits, seed)
    packed = nbits.pack_outputs(codes, bits)
    assert packed.dtype == np.uint8 and packed.shape == (n, nbits.output_row_bytes(k, bits))
    np.testing.assert_array_equal(nbits.unpack_outputs(packed, k, bits), codes)


@pytest.mark.parametrize("bits", [4, 8])
def test_one_mask_gives_eight_consecutive_outputs(bits):
    """The layout, word by word: plane i of 32-bit word j of a tile is output 8 i + j."""
    planes = 32 // bits
    codes = codes_of(3 * nbits.TILE_OUTPUTS, 2, bits)
    words = nbits.pack_channels(codes, bits).view("<u4").reshape(2, -1, nbits.WORDS)
    mask = (1 << bits) - 1
    for tile in range(words.shape[1]):
        for plane in range(planes):
            first = tile * nbits.WORDS * planes + plane * nbits.WORDS
            got = words[:, tile] >> np.uint32(plane * bits) & np.uint32(mask)
            np.testing.assert_array_equal(got.T, codes[first : first + nbits.WORDS].view(np.uint8) & mask)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("n", [1, 8, 63, 64, 65])
def test_channel_major_padding_is_zero(bits, n):
    packed = nbits.pack_channels(np.full((n, 3), -1, np.int8), bits)
    everything = nbits.unpack_channels(packed, nbits.columns(n), bits)
    assert (everything[:n] == -1).all() and not everything[n:].any()


def test_output_major_padding_is_a_zero_weight():
    packed = nbits.pack_outputs(np.full((2, 3), -8, np.int8), 4)
    np.testing.assert_array_equal(packed, [[0x00, 0x80], [0x00, 0x80]])
    np.testing.assert_array_equal(nbits.unpack_outputs(packed, 4, 4)[:, 3], [0, 0])


def test_output_major_codes_are_unsigned_lowest_bits_first():
    np.testing.assert_array_equal(nbits.pack_outputs(np.array([[-8, 7, 0]], np.int8), 4), [[0xF0, 0x88]])
    np.testing.assert_array_equal(nbits.pack_outputs(np.array([[-128, 127, 0]], np.int8), 8), [[0, 255, 128]])


@pytest.mark.parametrize("pack", [nbits.pack_channels, nbits.pack_outputs])
def test_codes_out_of_range_are_refused(pack):
    for code in (-9, 8):
        with pytest.raises(ValueError, match=r"4 bits hold -8\.\.7"):
            pack(np.array([[0, code]], np.int8), 4)
    with pytest.raises(ValueError, match=r"8 bits hold -128\.\.127"):
        pack(np.array([[0, 128]], np.int16), 8)
    with pytest.raises(ValueError, match="5 bits; expected 4 or 8"):
        pack(np.array([[0]], np.int8), 5)


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_of_another_length_are_refused(bits):
    codes = codes_of(65, 9, bits)
    with pytest.raises(ValueError, match=f"64 outputs of {bits} bits take rows of {64 * bits // 8}"):
        nbits.unpack_channels(nbits.pack_channels(codes, bits), 64, bits)
    with pytest.raises(ValueError, match=f"11 inputs of {bits} bits take"):
        nbits.unpack_outputs(nbits.pack_outputs(codes, bits), 11, bits)


@given(st.integers(0, 1000), BITS)
def test_property_every_output_has_its_own_column(n, bits):
    columns = nbits.column_of_output(n, bits)
    assert len(set(columns.tolist())) == n and (columns < nbits.columns(n)).all()


@given(st.integers(1, 1000), st.integers(1, 200))
def test_property_groups_cover_the_inputs(k, group):
    assert (nbits.group_count(k, group) - 1) * group < k <= nbits.group_count(k, group) * group
