from __future__ import annotations

import pytest
import torch

from qsparse_export.config import RopeScaling
from qsparse_export.nn.attention import attention_pattern
from qsparse_export.nn.rotary import Rotary, frequencies, rotate


def test_pattern_by_hand():
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 0]])
    pattern = attention_pattern(mask, 2, None).int()
    assert pattern.shape == (2, 1, 2, 4)
    assert pattern[0, 0].tolist() == [[0, 1, 1, 0], [0, 1, 1, 1]]
    assert pattern[1, 0].tolist() == [[0, 0, 1, 0], [0, 0, 0, 1]]  # all padding: itself, so that softmax has a value
    assert attention_pattern(torch.ones(1, 4), 4, 2).int()[0, 0].tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 0, 1, 1],
    ]


def test_rotation_equals_onnxs_operator():
    x = torch.randn(2, 3, 4 * 8)
    cos, sin = Rotary(8, 10000.0, None)(torch.tensor([[0, 1, 2], [5, 6, 700]]), torch.float32)
    torch.testing.assert_close(
        rotate(x, cos, sin, 4), torch.onnx.ops.rotary_embedding(x, cos, sin, num_heads=4), rtol=0, atol=0
    )


def test_rotation_depends_on_the_distance_alone():
    rotary = Rotary(8, 100.0, None)
    query, key = torch.randn(1, 1, 8), torch.randn(1, 1, 8)

    def score(i: int, j: int) -> float:
        def turned(t: torch.Tensor, position: int) -> torch.Tensor:
            cos, sin = rotary(torch.tensor([[position]]), torch.float32)
            return rotate(t, cos, sin, 1)

        return float((turned(query, i) * turned(key, j)).sum())

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)


def test_frequency_scaling():
    plain = frequencies(8, 10000.0, None)
    assert plain == pytest.approx((1, 0.1, 0.01, 0.001))
    assert frequencies(8, 10000.0, RopeScaling("linear", 4.0)) == pytest.approx([f / 4 for f in plain])
    scaled = frequencies(8, 10000.0, RopeScaling("llama3", 8.0, 1.0, 4.0, 1024))
    assert scaled[:2] == pytest.approx(plain[:2])  # short wavelengths stay
    assert scaled[3] == pytest.approx(plain[3] / 8)  # longer than the original context
    assert plain[2] / 8 < scaled[2] < plain[2]


def test_rotary_survives_meta_construction():
    with torch.device("meta"):
        rotary = Rotary(8, 10000.0, None)
    cos, _ = rotary(torch.tensor([[1]]), torch.float32)
    torch.testing.assert_close(cos[0, 0], torch.tensor(frequencies(8, 10000.0, None)).cos())
