"""PyTorch following its own choices computes what it computes alone, to the bit."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from qsparse_export import ops
from qsparse_export.formats.ternary import pack
from qsparse_export.guided import Guide, Tap, choice_taps
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


def taps_of(text: str) -> list[tuple[str, str, tuple[int, int, str] | None]]:
    ops.register()
    header = '<ir_version: 11, opset_import: ["" : 23, "ai.qsparse" : 1]>'
    weights = "uint8[96, 64] w, float16[3, 128] s, float[96, 16] f, float[2] a, uint8[40, 48] r, float16[40, 3] t, int64[2] ids"
    graph = onnx.parser.parse_model(f"{header} g (float[2, 96] x, {weights}) => (y) {{ {text} }}")
    return [(tap.op, tap.value, tap.selection) for tap in choice_taps(ir.from_proto(graph))]


@pytest.mark.parametrize(
    ("node", "products"),
    [
        (
            "SparseTernaryMatMul <k = {k}, block = {block}, rescale = {rescale}, n = [7, 9]> (x, w, a)",
            ["TernaryMatMul"] * 2,
        ),
        (
            "SparseMatMulNBits <k = {k}, block = {block}, rescale = {rescale}, n = [7, 9], bits = 4, group = 32> (x, w, s)",
            [],
        ),
        ("SparseMatMul <k = {k}, block = {block}, rescale = {rescale}, n = [7, 9]> (x, f)", []),
    ],
)
def test_a_node_with_a_mask_of_its_own_is_one_choice_of_channels(node, products):
    for k, block, rescale in ((40, 0, "none"), (16, 32, "none"), (96, 0, "l2")):
        text = node.format(k=k, block=block, rescale=f'"{rescale}"')
        selection = (k, block, rescale)
        expected = [("TopKSparsify", "x", selection), *[(product, "x", selection) for product in products]]
        assert taps_of(f"y = ai.qsparse.{text}") == expected
    text = node.format(k=96, block=0, rescale='"none"')
    assert taps_of(f"y = ai.qsparse.{text}") == [(product, "x", None) for product in products]


def test_the_head_and_its_embedding_choose_nothing():
    assert taps_of("y = ai.qsparse.DenseMatMulNBits <n = 40, k = 96, bits = 4, group = 32> (x, r, t)") == []
    assert taps_of("y = ai.qsparse.GatherNBits <k = 96, bits = 4, group = 32> (ids, r, t)") == []
