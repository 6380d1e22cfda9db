from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qsparse_export.errors import CheckpointError
from qsparse_export.nn import group_quantizer
from qsparse_export.nn.group_quantizer import group_codes, group_scales
from qsparse_export.weight_formats import GROUP_FORMATS, GroupFormat

FORMATS = [GroupFormat(4, 32), GroupFormat(8, 128), GroupFormat(4, 5)]


def dequantized(weight: torch.Tensor, chosen: GroupFormat) -> torch.Tensor:
    scales, _ = group_scales("a.weight", weight, chosen)
    assert scales.dtype == torch.float16 and scales.shape == (len(weight), -(-weight.shape[1] // chosen.group))
    codes = group_codes(weight, scales, chosen)
    half = 1 << chosen.bits - 1
    assert codes.dtype == torch.int8 and codes.shape == weight.shape
    if codes.numel():
        assert -half <= int(codes.min()) and int(codes.max()) < half
    return codes.double() * scales.double().repeat_interleave(chosen.group, dim=1)[:, : weight.shape[1]]


def absmax_error(weight: torch.Tensor, chosen: GroupFormat) -> float:
    """Of the plain way: the largest magnitude of a group gets the largest positive code."""
    most = (1 << chosen.bits - 1) - 1
    total = 0.0
    for start in range(0, weight.shape[1], chosen.group):
        part = weight[:, start : start + chosen.group].double()
        scale = (part.abs().amax(-1, keepdim=True) / most).clamp_min(1e-30)
        total += float((part - (part / scale).round() * scale).square().sum())
    return (total / float(weight.double().square().sum())) ** 0.5


@pytest.mark.parametrize("chosen", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_reported_error_is_the_one_that_is_left_and_beats_absmax(chosen, dtype):
    weight = torch.randn(37, 131).to(dtype)
    left = float((weight.double() - dequantized(weight, chosen)).norm() / weight.double().norm())
    reported = group_scales("a", weight, chosen)[1]
    assert reported == pytest.approx(left, rel=1e-4)
    assert reported < absmax_error(weight, chosen) * (0.95 if chosen.bits == 4 else 1.01)


@pytest.mark.parametrize("chosen", FORMATS, ids=str)
def test_weights_that_are_codes_times_a_scale_come_back(chosen):
    half = 1 << chosen.bits - 1
    codes = torch.randint(-half, half, (9, 131))
    codes[:, :: chosen.group] = -half
    scales = torch.tensor([0.5, -0.25, 0.125]).repeat(3).unsqueeze(1)
    weight = codes * scales
    torch.testing.assert_close(dequantized(weight, chosen), weight.double(), rtol=0, atol=0)
    assert group_scales("a", weight, chosen)[1] == 0


def test_every_code_is_the_nearest():
    chosen = GroupFormat(4, 8)
    weight = torch.randn(5, 16)
    scales, _ = group_scales("a", weight, chosen)
    spread = scales.double().repeat_interleave(8, dim=1)
    errors = (weight.double() - torch.arange(-8, 8).reshape(-1, 1, 1) * spread).abs()
    taken = (weight.double() - dequantized(weight, chosen)).abs()
    torch.testing.assert_close(taken, errors.amin(0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("chosen", FORMATS, ids=str)
def test_groups_of_zeros_have_code_zero_and_lose_nothing(chosen):
    weight = torch.randn(4, 2 * chosen.group)
    weight[:, : chosen.group] = 0
    assert not dequantized(weight, chosen)[:, : chosen.group].any()
    assert group_scales("a", torch.zeros(3, 7), chosen)[1] == 0
    assert not dequantized(torch.zeros(3, 7), chosen).any()


def test_an_empty_matrix_is_empty():
    assert dequantized(torch.zeros(0, 40), FORMATS[0]).shape == (0, 40)


@pytest.mark.parametrize("chosen", FORMATS, ids=str)
@pytest.mark.parametrize("largest", [1e-4, 1.0, 1e4])
def test_no_scale_overflows_or_vanishes(chosen, largest):
    weight = torch.randn(16, 64)
    weight *= largest / weight.abs().max()
    # Below 2**-14 float16 scales have fewer digits; at 1e-4 / 128 some percent are lost, and the error says so.
    error = float((weight.double() - dequantized(weight, chosen)).norm() / weight.double().norm())
    assert error == pytest.approx(group_scales("a", weight, chosen)[1], rel=1e-3)
    assert error < 0.15


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e7])
def test_weights_that_no_scale_can_hold_are_refused_by_name(value):
    weight = torch.randn(3, 40)
    weight[2, 39] = value
    for chosen in FORMATS[:2]:
        with pytest.raises(CheckpointError, match=r"model\.x\.weight holds a weight of magnitude .* finite"):
            group_scales("model.x.weight", weight, chosen)


@pytest.mark.parametrize("chosen", FORMATS, ids=str)
def test_slices_change_no_bit(monkeypatch, chosen):
    weight = torch.randn(70, 131)
    scales, error = group_scales("a", weight, chosen)
    codes = group_codes(weight, scales, chosen)
    monkeypatch.setattr(group_quantizer, "SLICE_WEIGHTS", 3 * 131)
    again, same_error = group_scales("a", weight, chosen)
    assert torch.equal(scales, again) and torch.equal(group_codes(weight, scales, chosen), codes)
    assert same_error == pytest.approx(error)


def test_threads_are_as_before():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        group_codes(torch.ones(2, 4), group_scales("a", torch.ones(2, 4), FORMATS[0])[0], FORMATS[0])
        with pytest.raises(CheckpointError):
            group_scales("a", torch.full((2, 4), torch.nan), FORMATS[0])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 90), st.sampled_from([4, 8]), st.integers(1, 99), st.integers(0, 999))
def test_property_never_worse_than_rounding_to_absmax(n, k, bits, group, seed):
    normal = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    weight = normal.sign() * (2 * normal).exp()  # outliers, and nothing whose scale is too small for float16
    chosen = GroupFormat(bits, group)
    # The scales of float16 have 11 bits: half a unit of their last place, on top of what float scales would leave.
    left = float((weight.double() - dequantized(weight, chosen)).norm() / weight.double().norm())
    assert left <= absmax_error(weight, chosen) + 2.0**-11


def test_the_formats_that_people_choose_are_those_of_the_decision_record():
    assert list(GROUP_FORMATS.items()) == [("int8", GroupFormat(8, 128)), ("int4", GroupFormat(4, 32))]
