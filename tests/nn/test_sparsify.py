from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from qsparse_export.config import SparsityRule, TopK
from qsparse_export.errors import UsageError
from qsparse_export.nn.deploy import deploy
from qsparse_export.nn.linear import BitLinear, QSparseLinear
from qsparse_export.nn.sparsify import sparsify

HALF, TENTH = TopK(0.5), TopK(0.1)


def plain() -> Any:
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4, bias=False))


@pytest.mark.parametrize(("quantization", "kind"), [("none", QSparseLinear), ("bitnet", BitLinear)])
def test_linears_are_swapped_in_place_and_keep_their_parameters(quantization, kind):
    module = plain()
    parameters = dict(module.named_parameters())
    swapped = sparsify(module, (SparsityRule("*", HALF),), quantization)
    assert type(module[0]) is kind and type(module[2]) is kind
    assert dict(module.named_parameters()).keys() == parameters.keys()
    assert all(p is parameters[n] for n, p in module.named_parameters())
    assert module[2].bias is None
    x = torch.randn(3, 8)
    torch.testing.assert_close(deploy(module)(x), module(x))
    assert swapped is module


def test_the_last_matching_rule_wins_and_others_are_left_alone():
    module = plain()
    sparsify(module, (SparsityRule("[02]", HALF), SparsityRule("2", TENTH)))
    assert (module[0].topk, module[2].topk) == (HALF, TENTH)
    module = plain()
    sparsify(module, (SparsityRule("2", HALF),))
    assert type(module[0]) is nn.Linear and module[2].topk == HALF
    sparsify(module, (SparsityRule("2", TENTH),))
    assert module[2].topk == TENTH  # again, with another ratio


def test_a_linear_alone_is_replaced():
    linear = nn.Linear(4, 4)
    replaced = sparsify(linear, (SparsityRule("*", HALF),))
    assert isinstance(replaced, QSparseLinear) and replaced.weight is linear.weight


def test_a_rule_that_matches_nothing_is_an_error_with_near_names():
    module = nn.Sequential()
    module.add_module("down_proj", nn.Linear(4, 4))
    with pytest.raises(UsageError, match="no linear of Sequential is called 'down_prj'; did you mean down_proj"):
        sparsify(module, (SparsityRule("down_prj", HALF),))


def test_a_linear_used_in_two_places_stays_one():
    shared = nn.Linear(4, 4)
    module = nn.Sequential(shared, nn.ReLU(), shared)
    sparsify(module, (SparsityRule("*", HALF),))
    assert module[0] is module[2] and isinstance(module[0], QSparseLinear)
    deployed: Any = deploy(module)
    assert deployed[0] is deployed[2]


def test_linears_whose_weights_are_read_by_their_owner_are_refused():
    attention = nn.MultiheadAttention(8, 2)
    with pytest.raises(UsageError, match="out_proj is a NonDynamicallyQuantizableLinear"):
        sparsify(attention, (SparsityRule("*", HALF),))


@torch.no_grad()
def test_the_fast_path_of_transformer_layers_does_not_bypass_the_mask():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(1, 3, 8)
    dense = layer(x)
    sparsify(layer, (SparsityRule("linear2", TopK(1.0)),))  # keeps nothing
    assert not torch.allclose(layer(x), dense)
    torch.testing.assert_close(layer.linear2(x.new_ones(1, 16)), layer.linear2.bias[None])


def test_a_swapped_module_trains():
    torch.manual_seed(0)
    module = sparsify(plain(), (SparsityRule("*", HALF),), "bitnet")
    x, target = torch.randn(32, 8), torch.randn(32, 4)
    optimiser = torch.optim.Adam(module.parameters(), lr=0.05)
    losses = []
    for _ in range(80):
        loss = (module(x) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
