"""PyTorch following its own choices computes what it computes alone, to the bit."""

import numpy as np
import torch

from qsparse_export.formats.ternary import pack
from qsparse_export.guided import Guide, Tap
from qsparse_export.ops.ternary_matmul import ternary_matmul
from qsparse_export.ops.topk_sparsify import topk_sparsify


def test_a_guide_that_repeats_pytorchs_own_choices_changes_no_bit():
    """Rows of bfloat16 values have many exact ties: 127 / gamma must have the op's last bit for them to round alike."""
    random = np.random.default_rng(0)
    x = torch.from_numpy(random.standard_normal((400, 96)).astype(np.float32)).bfloat16().float()
    w = torch.from_numpy(pack(random.integers(-1, 2, (40, 96)).astype(np.int8)))
    scale = torch.tensor([0.37])
    masked = topk_sparsify(x, 60, 0, "none")
    expected = ternary_matmul(masked, w, scale, 40)
    choices = [(Tap("TopKSparsify", "a", "a"), masked.numpy()), (Tap("TernaryMatMul", "b", "b"), masked.numpy())]
    with Guide(choices, 6e-5) as guide:
        followed = topk_sparsify(x, 60, 0, "none")
        y = ternary_matmul(followed, w, scale, 40)
    assert torch.equal(y, expected)
    assert (guide.flips, guide.wrong) == (0, [])


def test_a_choice_that_pytorch_could_not_have_made_is_reported():
    x = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    theirs = np.array([[4.0, 0.0, 0.0, 1.0]], np.float32)
    with Guide([(Tap("TopKSparsify", "a", "layer 7"), theirs)], 1e-4) as guide:
        topk_sparsify(x, 2, 0, "none")
    assert guide.flips == 1
    (wrong,) = guide.wrong
    assert wrong.scope == "layer 7" and "kept other channels" in wrong.reason
