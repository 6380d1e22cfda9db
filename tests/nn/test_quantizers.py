from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qsparse_export.nn.quantizers import absmax_int8, absmean_scale, absmean_ternary, straight_through


def test_activations_by_hand():
    q, gamma = absmax_int8(torch.tensor([[127.0, -2.5, 1.5, 0.5], [0.0, 0.0, 0.0, 0.0]]))
    assert q.tolist() == [[127, -2, 2, 0], [0, 0, 0, 0]]  # round half to even
    assert gamma.squeeze(-1).tolist() == [127.0, pytest.approx(1e-5)]


def test_weights_by_hand():
    w, alpha = absmean_ternary(torch.tensor([[3.0, -0.2], [-3.0, 1.8]]))
    assert alpha.item() == pytest.approx(2.0)
    assert w.tolist() == [[1, 0], [-1, 1]]
    assert absmean_scale(torch.zeros(2, 2)).item() == pytest.approx(1e-5)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=16))
def test_property_values_are_exact_integers_even_with_gradients(values):
    """Not only near integers, as x + (Q(x) - x) would be."""
    x = torch.tensor([values], requires_grad=True)
    q, gamma = absmax_int8(x)
    assert q.eq(q.round()).all() and q.abs().max() <= 128
    assert ((q * gamma / 127 - x).abs() <= gamma / 127 * 0.5001).all()
    w, _ = absmean_ternary(x)
    assert set(w.flatten().tolist()) <= {-1.0, 0.0, 1.0}


def test_gradients_are_those_of_the_identity():
    x = torch.randn(3, 8, requires_grad=True)
    incoming = torch.randn(3, 8)
    q, gamma = absmax_int8(x)
    (q * gamma / 127 * incoming).sum().backward()
    torch.testing.assert_close(x.grad, incoming)
    weight = torch.randn(4, 8, requires_grad=True)
    w, alpha = absmean_ternary(weight)
    (w * alpha).sum().backward()
    torch.testing.assert_close(weight.grad, torch.ones(4, 8))


def test_straight_through_is_exact_and_passes_the_gradient_whole():
    x = torch.tensor([1e8, -3.7], requires_grad=True)
    y = straight_through(x, torch.tensor([1.0, 2.0]))
    assert y.tolist() == [1.0, 2.0]
    y.backward(torch.tensor([5.0, 6.0]))
    assert x.grad is not None and x.grad.tolist() == [5.0, 6.0]


def test_half_precision_is_quantised_in_float32():
    x = torch.randn(5, 64).half()
    assert torch.equal(absmax_int8(x)[0], absmax_int8(x.float())[0])
