"""keep_dequantized: the same results, each matrix made once while there is room, and nothing kept afterwards."""

import torch

from qsparse_export.ops.kept_matrices import dequantized_once, keep_dequantized


class Maker:
    def __init__(self):
        self.made = 0

    def __call__(self):
        self.made += 1
        return torch.full((4, 4), float(self.made))  # 64 bytes


def test_without_it_every_call_makes_one():
    make, packed = Maker(), torch.zeros(4, dtype=torch.uint8)
    assert [dequantized_once(packed, make)[0, 0] for _ in range(2)] == [1, 2]


def test_within_it_each_is_made_once_and_none_afterwards():
    make, packed = Maker(), torch.zeros(8, dtype=torch.uint8)
    with keep_dequantized(1000):
        assert [dequantized_once(packed, make)[0, 0] for _ in range(3)] == [1, 1, 1]
        assert dequantized_once(packed[4:], make)[0, 0] == 2, "another matrix in the same storage"
        assert dequantized_once(packed[:4], make)[0, 0] == 3, "another shape at the same address"
    assert dequantized_once(packed, make)[0, 0] == 4


def test_what_has_no_room_is_made_every_time():
    make, first, second = Maker(), torch.zeros(4, dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8)
    with keep_dequantized(100):
        assert [dequantized_once(packed, make)[0, 0] for packed in (first, second, first, second)] == [1, 2, 1, 3]


def test_the_ops_give_the_same_bits_within_it():
    from qsparse_export.formats import nbits
    from qsparse_export.ops.dense_matmul_nbits import dense_matmul_nbits
    from qsparse_export.ops.sparse_matmul_nbits import matmul_nbits

    random = torch.Generator().manual_seed(0)
    x = torch.randn(3, 32, generator=random)
    w = torch.randint(0, 256, (32, nbits.columns(20) // 2), dtype=torch.uint8, generator=random)
    scales = torch.rand(2, nbits.columns(20), generator=random).half()
    rows = torch.randint(0, 256, (20, 16), dtype=torch.uint8, generator=random)
    row_scales = torch.rand(20, 2, generator=random).half()

    def results():
        return matmul_nbits(x, w, scales, 20, 4, 16), dense_matmul_nbits(x, rows, row_scales, 20, 4, 16)

    alone = results()
    with keep_dequantized(1 << 20):
        for again in (results(), results()):
            assert all(torch.equal(a, b) for a, b in zip(alone, again, strict=True))
