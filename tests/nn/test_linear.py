from __future__ import annotations

import pytest
import torch

from qsparse_export.config import TopK
from qsparse_export.nn.linear import BitLinear, QSparseLinear
from qsparse_export.ops.topk_sparsify import topk_mask

TOPK = TopK(0.5)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_forward_is_the_papers_formula():
    linear, x = QSparseLinear(8, 5, TOPK, bias=True), random(3, 8)
    mask = topk_mask(x, 4)
    assert mask.sum(-1).tolist() == [4, 4, 4]
    torch.testing.assert_close(linear(x), (x * mask) @ linear.weight.t() + linear.bias)


def test_gradient_of_the_input_ignores_the_mask_and_that_of_the_weight_does_not():
    linear, x, incoming = QSparseLinear(8, 5, TOPK, bias=True), random(3, 8).requires_grad_(), random(3, 5)
    linear(x).backward(incoming)
    torch.testing.assert_close(x.grad, incoming @ linear.weight)
    torch.testing.assert_close(linear.weight.grad, incoming.t() @ (x * topk_mask(x, 4)).detach())
    torch.testing.assert_close(linear.bias.grad, incoming.sum(0))


@pytest.mark.parametrize("topk", [TopK(), TOPK, TopK(0.5, block=4), TopK(0.5, rescale="l2")])
def test_bitlinear_forward_is_the_formula_on_fake_quantised_values(topk):
    linear, x = BitLinear(8, 5, topk, bias=True), random(3, 8)
    width = topk.block or 8
    masked = x * topk_mask(x, topk.k(8), topk.block) if width else x
    if topk.rescale == "l2":
        masked = masked / masked.norm(dim=-1, keepdim=True)
    gamma = masked.abs().amax(-1, keepdim=True)
    alpha = linear.weight.abs().mean()
    fake_x = (masked * 127 / gamma).round() * gamma / 127
    fake_w = (linear.weight / alpha).round().clamp(-1, 1) * alpha
    torch.testing.assert_close(linear(x), fake_x @ fake_w.t() + linear.bias)


def test_the_mask_comes_from_the_float_values_not_from_the_quantised_ones():
    """Q(X) ties at 127; masking before or after quantising is the same as long as the float magnitudes choose."""
    x = torch.tensor([[1.0, 0.9999, 0.9998, -1.0001]])
    linear = BitLinear(4, 4, TopK(0.75))
    with torch.no_grad():
        linear.weight.copy_(torch.eye(4))
        alpha = linear.weight.abs().mean()
        assert linear(x)[0].div(alpha).round(decimals=3).tolist() == [0, 0, 0, -1]


def test_bitlinear_gradients_are_straight_through():
    linear, x, incoming = BitLinear(8, 5, TOPK, bias=True), random(3, 8).requires_grad_(), random(3, 5)
    linear(x).backward(incoming)
    masked = (x * topk_mask(x, 4)).detach()
    gamma = masked.abs().amax(-1, keepdim=True)
    alpha = linear.weight.detach().abs().mean()
    fake_x = (masked * 127 / gamma).round() * gamma / 127
    fake_w = (linear.weight.detach() / alpha).round().clamp(-1, 1) * alpha
    torch.testing.assert_close(x.grad, incoming @ fake_w)
    torch.testing.assert_close(linear.weight.grad, incoming.t() @ fake_x)
    torch.testing.assert_close(linear.bias.grad, incoming.sum(0))


def test_linear_norm_comes_before_mask_and_quantiser():
    linear, x = BitLinear(8, 5, TOPK, linear_norm_eps=1e-6), random(3, 8)
    assert set(linear.state_dict()) == {"weight", "rms_norm.weight"}
    assert linear.rms_norm is not None
    with torch.no_grad():
        linear.rms_norm.weight.copy_(random(8))
        normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * linear.rms_norm.weight
        plain = BitLinear(8, 5, TOPK)
        plain.weight = linear.weight
        torch.testing.assert_close(linear(x), plain(normed))


@pytest.mark.parametrize("kind", [QSparseLinear, BitLinear])
def test_row_scale_multiplies_before_the_bias_and_rounds_once(kind):
    linear, x = kind(8, 5, TOPK, bias=True).half(), random(3, 8).half()
    scale = torch.full((3, 1), 1000.0)
    expected = (linear(x).float() - linear.bias.float()) * 1000 + linear.bias.float()
    torch.testing.assert_close(linear(x, scale).float(), expected, rtol=5e-3, atol=1.0)
    assert linear(x, scale).dtype == torch.float16


@pytest.mark.parametrize("ratio", [1.0, 0.0])
def test_keeping_nothing_and_keeping_everything(ratio):
    linear, x = QSparseLinear(8, 5, TopK(ratio)), random(3, 8)
    torch.testing.assert_close(linear(x), linear.weight.new_zeros(3, 5) if ratio else x @ linear.weight.t())


def test_zero_tokens():
    for kind in (QSparseLinear, BitLinear):
        assert kind(8, 5, TOPK)(torch.zeros(2, 0, 8)).shape == (2, 0, 5)
