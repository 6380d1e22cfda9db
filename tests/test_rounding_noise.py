"""The noise that verification allows n-bit products is that of 16-bit activations, and touches nothing else."""

import numpy as np
import pytest
import torch

from qsparse_export.formats import nbits
from qsparse_export.ops.dense_matmul_nbits import dense_matmul_nbits
from qsparse_export.ops.sparse_matmul_nbits import matmul_nbits
from qsparse_export.rounding_noise import LARGEST_STEP, ActivationNoise


@pytest.mark.parametrize(("bits", "block"), [(4, 64), (8, 32)])
@pytest.mark.parametrize("op", ["linear", "head"])
def test_each_activation_moves_by_less_than_half_a_step_of_the_largest_beside_it(op, bits, block):
    """Weights 1 on the diagonal show what became of x."""
    k, group = 100, 16
    columns = nbits.columns(k)
    codes = np.eye(k, dtype=np.int8)
    x = torch.randn(3, k) * torch.logspace(0, 3, k)
    x[:, 5] = 0
    ones = torch.ones(k, -(-k // group), dtype=torch.float16)
    if op == "head":
        operands = (torch.from_numpy(nbits.pack_outputs(codes, bits)), ones, k, bits, group)
        run = dense_matmul_nbits
    else:
        scales = torch.ones(-(-k // group), columns, dtype=torch.float16)
        operands = (torch.from_numpy(nbits.pack_channels(codes, bits)), scales, k, bits, group)
        run, block = matmul_nbits, group
    with ActivationNoise(torch.Generator().manual_seed(1)):
        moved = run(x, *operands)
        other = x @ torch.eye(k)
    assert torch.equal(other, x)
    for start in range(0, k, block):
        part = slice(start, start + block)
        limit = x[:, part].abs().amax(-1, keepdim=True) * LARGEST_STEP
        difference = (moved - x)[:, part].abs()
        assert (difference <= limit * (1 + 1e-3) + x[:, part].abs() * 2.0**-23).all()
        assert (difference > limit * 0.25).any()
    assert not moved[:, 5].any()
