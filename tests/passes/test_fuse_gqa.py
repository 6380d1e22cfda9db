"""fuse-gqa: what it matches and what not, that twice is once, and that left padding and positions keep their meaning."""

import numpy as np
import onnx_ir as ir
import pytest
from graph_text import graph_of, kinds, run, spelled

from qsparse_export.errors import UsageError
from qsparse_export.ops.cached_attention import SHARED_CACHE
from qsparse_export.passes.fuse_gqa import FuseGqa, explain

ROTARY = "rq = RotaryEmbedding <num_heads = 4> (q, cos, sin) rk = RotaryEmbedding <num_heads = 2> (k, cos, sin)"
ATTENTION = "y, nk, nv = Attention <q_num_heads = 4, kv_num_heads = 2> (rq, rk, v, mask, pk, pv)"
# attention_mask [B, T] to what exporters make of it: causal, and not padding, but every query sees itself.
MASK = """
zero = Constant <value = int64 {0}> () one = Constant <value = int64 {1}> () last = Constant <value = int64[1] {-1}> ()
between = Constant <value = int64[2] {1, 2}> ()
t1 = Shape <start = 1> (attention_mask) t = Squeeze (t1) s1 = Shape <start = 1, end = 2> (input_ids) s = Squeeze (s1)
slots = Range (zero, t, one) past = Sub (t, s) first = Range (zero, s, one) moved = Add (first, past)
queries = Unsqueeze (moved, last) causal = COMPARE (slots, queries) attended = Cast <to = 9> (attention_mask)
wide = Unsqueeze (attended, between) both = And (causal, wide) itself = Equal (slots, queries) mask = Or (both, itself)
"""
TEXT = f"{MASK.replace('COMPARE', 'LessOrEqual')} {ROTARY} {ATTENTION}"


def graph(text: str = TEXT, dtype: str = "float", width: int = 8) -> ir.Model:
    heads = ", ".join(f"{dtype}[batch, sequence, {n * width}] {name}" for name, n in (("q", 4), ("k", 2), ("v", 2)))
    angles = f"{dtype}[batch, sequence, {width // 2}] cos, {dtype}[batch, sequence, {width // 2}] sin"
    past = f"{dtype}[batch, 2, P, {width}] pk, {dtype}[batch, 2, P, {width}] pv"
    ids = "int64[batch, sequence] input_ids, int64[batch, total] attention_mask"
    out = f"{dtype}[batch, sequence, {4 * width}] y, {dtype}[batch, 2, N, {width}] nk, {dtype}[batch, 2, N, {width}] nv"
    made = graph_of(f"({ids}, {heads}, {angles}, {past}) => ({out})", text)
    for node in made.graph:  # the mask's shape, as the exporter gives it
        if node.outputs[0].name == "mask":
            node.outputs[0].shape = ir.Shape(["batch", 1, "sequence", "total"])
    return made


def feeds(batch: int, tokens: int, past: int, dtype: type = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(4)
    attended = np.ones((batch, past + tokens), np.int64)
    attended[-1, :3] = 0  # left padding
    angles = rng.uniform(0, 6, (batch, tokens, 4))  # positions of no order: they are not counted again
    made = {"input_ids": np.ones((batch, tokens), np.int64), "attention_mask": attended}
    arrays = {name: rng.standard_normal((batch, tokens, n)) for name, n in (("q", 32), ("k", 16), ("v", 16))}
    arrays |= {"cos": np.cos(angles), "sin": np.sin(angles)}
    arrays |= {name: rng.standard_normal((batch, 2, past, 8)) for name in ("pk", "pv")}
    return made | {name: array.astype(dtype) for name, array in arrays.items()}


@pytest.mark.parametrize(("dtype", "kind"), [("float", np.float32), ("float16", np.float16)])
@pytest.mark.parametrize(("batch", "tokens", "past"), [(2, 5, 0), (2, 1, 6), (1, 3, 4)])
def test_left_padding_and_positions_keep_their_meaning(dtype, kind, batch, tokens, past):
    given = feeds(batch, tokens, past, kind)
    expected = run(graph(dtype=dtype), given, False)
    lowered = graph(dtype=dtype)
    assert FuseGqa()(lowered).modified
    assert kinds(lowered).count("GroupQueryAttention") == 1 and "Attention" not in kinds(lowered)
    for got, wanted in zip(run(lowered, given, False), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-6 if kind is np.float32 else 4e-3)


@pytest.mark.parametrize(("batch", "tokens", "past"), [(2, 5, 0), (2, 1, 6), (1, 3, 4)])
def test_right_padding_needs_no_bias(batch, tokens, past):
    given = feeds(batch, tokens, past, np.float16)
    given["attention_mask"][:] = 1
    filled = tokens
    if past == 0:  # padding behind a prompt; a token after it is written where the padding was, which is another cache
        given["attention_mask"][-1, -2:] = 0
        filled = tokens - 2
    expected = run(graph(dtype="float16"), given, False)
    lowered = graph(dtype="float16")
    assert FuseGqa(padding="right")(lowered).modified
    node = next(node for node in lowered.graph if node.op_type == "GroupQueryAttention")
    assert len(node.inputs) == 7, "no bias"
    for got, wanted in zip(run(lowered, given, False), expected, strict=True):
        axis = 1 if got.ndim == 3 else 2
        rows = [np.take(array[-1:], range(past * (axis == 2) + filled), axis) for array in (got, wanted)]
        np.testing.assert_allclose(got[:-1], wanted[:-1], rtol=0, atol=4e-3)
        np.testing.assert_allclose(*rows, rtol=0, atol=4e-3)


def test_right_padding_takes_no_mask_that_hides_more():
    reason = "the mask is not provably that of attended slots and causal, and nothing more"
    window = TEXT.replace(
        "attended =",
        "width = Constant <value = int64 {4096}> () oldest = Sub (queries, width) near = Greater (slots, oldest) "
        "seen = And (causal, near) attended =",
    ).replace("And (causal, wide)", "And (seen, wide)")
    assert unfused(graph(window, "float16"), padding="right") == reason
    assert unfused(graph(), padding="right") == "CUDA's kernel takes float16 alone"
    assert FuseGqa()(graph(window)).modified, "a bias carries the window"
    with pytest.raises(UsageError, match="padding=left; expected any or right"):
        FuseGqa(padding="left")(graph())


def test_a_batch_of_chunks_is_refused_by_the_runtime_and_not_computed_wrong():
    lowered = graph()
    FuseGqa()(lowered)
    with pytest.raises(Exception, match="batch_size must be 1"):
        run(lowered, feeds(2, 3, 4), False)


def test_the_masks_values_are_made_once_and_the_cache_may_be_one_buffer():
    twice = TEXT.replace(ATTENTION, "") + (
        "a, ak, av = Attention <q_num_heads = 4, kv_num_heads = 2> (rq, rk, v, mask, pk, pv) "
        "rq2 = RotaryEmbedding <num_heads = 4> (a, cos, sin) rk2 = RotaryEmbedding <num_heads = 2> (k, cos, sin) "
        "y, nk, nv = Attention <q_num_heads = 4, kv_num_heads = 2> (rq2, rk2, v, mask, pk, pv)"
    )
    lowered = graph(twice)
    assert FuseGqa()(lowered).modified
    assert kinds(lowered).count("GroupQueryAttention") == 2 and kinds(lowered).count("Where") == 1
    assert SHARED_CACHE not in lowered.metadata_props, "the first cache is no output, and the past has two readers"
    one = graph()
    FuseGqa()(one)
    assert one.metadata_props[SHARED_CACHE] == "true" and one.opset_imports["com.microsoft"] == 1


def test_twice_changes_nothing():
    lowered = graph()
    assert FuseGqa()(lowered).modified
    before = spelled(lowered)
    assert not FuseGqa()(lowered).modified and spelled(lowered) == before


def unfused(made: ir.Model, padding: str = "any") -> str:
    """Asserts that nothing is lowered, and returns why."""
    before = spelled(made)
    reason = explain(made.graph, next(node for node in made.graph if node.op_type == "Attention"), padding)
    assert not FuseGqa(padding)(made).modified and spelled(made) == before
    return reason


def test_what_does_not_match_says_why():
    odd = graph(TEXT, width=12)
    assert unfused(odd) == "heads are 12 wide, and GroupQueryAttention takes multiples of 8"
    reason = "the mask is not provably causal, and GroupQueryAttention is"
    assert unfused(graph(TEXT.replace("LessOrEqual (slots, queries)", "GreaterOrEqual (slots, queries)"))) == reason
    floats = (
        "zero = Constant <value = float {0.0}> () long = Cast <to = 1> (attention_mask) seen = Greater (long, zero) "
    )
    axes = "axes = Constant <value = int64[2] {1, 2}> () mask = Unsqueeze (seen, axes)"
    assert unfused(graph(f"{floats} {axes} {ROTARY} {ATTENTION}")) == reason
