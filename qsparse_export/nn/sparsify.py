"""Turns the linears of any module into Q-Sparse or BitNet ones, by name pattern."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from qsparse_export.config import SparsityRule, TopK, topk_of
from qsparse_export.errors import UsageError, near_names
from qsparse_export.nn.linear import BitLinear, QSparseLinear

_SWAPPABLE = (nn.Linear, QSparseLinear, BitLinear)


def sparsify(
    module: nn.Module, rules: Sequence[SparsityRule], quantization: Literal["none", "bitnet"] = "none"
) -> nn.Module:
    """Swaps, in place, each ``nn.Linear`` whose full name matches a rule's ``fnmatch`` pattern; the last match wins.

    Weights and biases are shared with the linears that are replaced, so optimisers and state dicts go on working.
    Returns ``module`` (or its replacement when it is itself a linear). Raises UsageError when a rule matches no linear,
    or one of a subclass whose weights are read past its forward method (as nn.MultiheadAttention's ``out_proj``).
    """
    found = {
        name: child for name, child in module.named_modules(remove_duplicate=False) if isinstance(child, nn.Linear)
    }
    for rule in rules:
        if not any(fnmatch.fnmatchcase(name, rule.pattern) for name in found):
            raise UsageError(
                f"no linear of {type(module).__name__} is called {rule.pattern!r}; {near_names(rule.pattern, found)}"
            )
    chosen = {n: c for n, c in found.items() if any(fnmatch.fnmatchcase(n, rule.pattern) for rule in rules)}
    for name, linear in chosen.items():
        if type(linear) not in _SWAPPABLE:
            raise UsageError(
                f"{name} is a {type(linear).__name__}, not a plain nn.Linear: its owner may use the weight without calling "
                "it, so a mask would have no effect; exclude it with a narrower pattern"
            )
    swapped: dict[tuple[int, TopK], nn.Linear] = {}
    for name, linear in chosen.items():
        topk = topk_of(tuple(rules), name)
        key = (id(linear), topk)  # a linear that is used in two places stays one
        if key not in swapped:
            swapped[key] = _replacement(linear, topk, quantization)
        if not name:
            return swapped[key]
        module.set_submodule(name, swapped[key])
    for child in module.modules():
        if isinstance(child, nn.TransformerEncoderLayer):
            child.activation_relu_or_gelu = 0  # its fast path would read linear1.weight past our forward
    return module


def _replacement(linear: nn.Linear, topk: TopK, quantization: str) -> nn.Linear:
    bias = linear.bias is not None
    with torch.device("meta"):
        new: nn.Linear
        if quantization == "bitnet":
            norm = linear.rms_norm if isinstance(linear, BitLinear) else None
            new = BitLinear(linear.in_features, linear.out_features, topk, bias)
            new.rms_norm = norm
        else:
            new = QSparseLinear(linear.in_features, linear.out_features, topk, bias)
    new.weight, new.bias = linear.weight, linear.bias
    return new.train(linear.training)
