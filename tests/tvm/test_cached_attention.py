"""CachedAttention on this machine's instruction sets, against the reference of the op."""

import numpy as np
import pytest
import tvm
from evidence import EXECUTED, Evidence, share_within
from hypothesis import given, settings
from hypothesis import strategies as st
from prim_func_calls import LANES, compiled

from qsparse_export.ops import cached_attention as op
from qsparse_export.runtimes.tvm.kernels.cached_attention import KEYS, cached_attention

every_lanes = pytest.mark.parametrize("lanes", LANES, ids=[lanes.name for lanes in LANES])
HEADS = [(9, 3, 64), (4, 4, 6), (2, 1, 16), (1, 1, 2)]


def operands(rng, heads, kv_heads, width, batch, tokens, past, room):
    """Random operands; every query may look at its own key and about half of the others."""
    total = past + tokens
    qkv = rng.standard_normal((batch, tokens, (heads + 2 * kv_heads) * width)).astype(np.float32)
    angles = rng.standard_normal((batch, tokens, width // 2))
    visible = rng.random((batch, 1, tokens, total)) < 0.5
    visible[..., range(tokens), range(past, total)] = True
    key, value = rng.standard_normal((2, batch, kv_heads, total + room, width)).astype(np.float32)
    return [qkv, np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32), visible, key, value]


def run(lanes, arrays, heads, kv_heads, width):
    """y and both caches, which the kernel writes in place."""
    kernel = compiled(cached_attention, lanes, heads=heads, kv_heads=kv_heads, width=width)
    qkv, *others = arrays
    batch, tokens, row = qkv.shape
    tensors = [tvm.runtime.tensor(np.ascontiguousarray(array)) for array in (qkv.reshape(-1, row), *others)]
    y = tvm.runtime.tensor(np.full((batch * tokens, heads * width), 7, np.float32))
    kernel(*tensors, y)
    return y.numpy().reshape(batch, tokens, -1), tensors[4].numpy(), tensors[5].numpy()


def check(lanes, arrays, heads, kv_heads, width):
    """The largest error, as a share of what is allowed."""
    y, key, value = op.reference(*arrays, heads, kv_heads)
    got, got_key, got_value = run(lanes, arrays, heads, kv_heads, width)
    np.testing.assert_allclose(got_key, key, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(got_value, value)
    # Scores of some units are rounded in float32 before they become weights, and the weights add up.
    return share_within(got, y, rtol=1e-4, atol=1e-5)


@every_lanes
@pytest.mark.parametrize(("heads", "kv_heads", "width"), HEADS)
@pytest.mark.parametrize(
    ("batch", "tokens", "past", "room"),
    [(1, 1, 0, 0), (1, 1, KEYS - 1, 0), (1, 1, KEYS, 3), (2, 1, KEYS + 1, 1), (2, 3, 5, 0), (1, 40, 0, 7)],
)
def test_against_the_reference(lanes, heads, kv_heads, width, batch, tokens, past, room, evidence):
    rng = np.random.default_rng(tokens + past)
    share = check(lanes, operands(rng, heads, kv_heads, width, batch, tokens, past, room), heads, kv_heads, width)
    evidence(Evidence("CachedAttention", "TVM", lanes.name, EXECUTED, error_share=share))


@every_lanes
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 5),
    past=st.integers(0, 3 * KEYS),
    room=st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_any_lengths(lanes, seed, batch, tokens, past, room):
    check(lanes, operands(np.random.default_rng(seed), 4, 2, 8, batch, tokens, past, room), 4, 2, 8)


@every_lanes
def test_a_query_that_sees_nothing_is_nan_and_a_hidden_nan_is_not_seen(lanes):
    arrays = operands(np.random.default_rng(1), 4, 2, 8, 2, 3, 70, 0)
    visible, key, _value = arrays[3:]
    visible[0, 0, 1] = False
    visible[1, :, :, :40] = False
    key[1, :, 5] = np.nan
    y, *_ = run(lanes, arrays, 4, 2, 8)
    assert np.isnan(y[0, 1]).all()
    assert np.isfinite(y[0, 0]).all() and np.isfinite(y[1]).all()
    visible[1, :, 2, 5] = True
    y, *_ = run(lanes, arrays, 4, 2, 8)
    assert np.isnan(y[1, 2]).all() and np.isfinite(y[1, :2]).all()


@every_lanes
def test_large_scores_do_not_overflow(lanes):
    arrays = operands(np.random.default_rng(2), 4, 2, 8, 1, 2, 50, 0)
    arrays[0][..., :32] *= 300
    check(lanes, arrays, 4, 2, 8)
