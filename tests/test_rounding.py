"""Provoked rounding moves each layer's input by as much as sums of its number format may, and no more."""

import numpy as np
import pytest
import torch
from counting_models import QSPARSE

from qsparse_export import ops
from qsparse_export.nn.decoder import Decoder
from qsparse_export.rounding import RUNS, layers_of, nudged
from qsparse_export.verify import Case


@pytest.mark.parametrize(
    ("dtype", "most"), [("float32", 128**0.5 * 2.0**-23), ("float16", 10**0.5 * 2.0**-11)], ids=["float32", "float16"]
)
def test_inputs_of_layers_move_by_what_their_sums_round(dtype, most):
    """float16 products are summed in float32: what moves is what is rounded to float16 once by each op, and not by a sum."""
    ops.register()
    torch.manual_seed(0)
    case = Case(Decoder(QSPARSE).to(getattr(torch, dtype)).eval(), QSPARSE, dtype, (1, 2, 3))
    seen = []
    first = layers_of(case.module)[0]
    first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].float().numpy()))

    def logits() -> np.ndarray:
        return case.judge().logits(case.prompt)

    logits()
    [before] = seen
    before = before.copy()
    first._forward_pre_hooks.clear()
    first.forward = _noted(first.forward, seen)
    list(nudged(case, logits))
    assert len(seen) == 1 + RUNS
    for moved in seen[1:]:
        difference = np.abs(moved - before) / np.maximum(np.abs(before), 1e-6)
        unit = float(torch.finfo(getattr(torch, dtype)).eps)
        assert 0.5 * most < difference.max() <= most + unit


def _noted(forward, seen):
    def noted(x, *rest, **named):
        seen.append(x.float().numpy().copy())
        return forward(x, *rest, **named)

    return noted
