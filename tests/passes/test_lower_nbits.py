"""lower-nbits: the head and the embedding keep their values in ONNX Runtime's own ops, on the same bytes; what is left alone."""

import numpy as np
import onnx_ir as ir
import pytest
from graph_text import graph_of, kinds, run, spelled

from qsparse_export.formats.nbits import pack_outputs
from qsparse_export.ops import dense_matmul_nbits, gather_nbits
from qsparse_export.passes.lower_nbits import LowerNBits, explain

N, K = 40, 64
HEAD = "y = ai.qsparse.DenseMatMulNBits <n = 40, k = {k}, bits = {bits}, group = {group}> (x, w, scales)"
EMBEDDING = "e = ai.qsparse.GatherNBits <k = {k}, bits = {bits}, group = {group}> (ids, w, scales)"
NARROWED = EMBEDDING + " h = Cast <to = 10> (e)"


def tied(text: str, bits: int, group: int = 16, k: int = K, dtype: str = "float") -> ir.Model:
    """Graph of x [2, 3, k] and ids [2, 3], with the outputs that ``text`` makes."""
    rng = np.random.default_rng(bits)
    codes = rng.integers(-(1 << bits - 1), 1 << bits - 1, (N, k)).astype(np.int8)
    weights = {
        "w": pack_outputs(codes, bits),
        "scales": (rng.random((N, -(-k // group))) / 50).astype(np.float16),
    }
    spelled_out = text.format(bits=bits, group=group, k=k)
    types = {
        "y": f"{dtype}[2, 3, {N}] y",
        "e": f"float[2, 3, {k}] e",
        "h": f"float16[2, 3, {k}] h",
        "z": f"float[2, 3, {k}] z",
    }
    for inner, reader in (("e", " h = "), ("h", " z = ")):
        if reader in spelled_out:
            del types[inner]
    outputs = ", ".join(text for name, text in types.items() if f"{name} = " in spelled_out)
    return graph_of(f"({dtype}[2, 3, {k}] x, int64[2, 3] ids) => ({outputs})", spelled_out, weights)


def feeds(k: int = K, dtype: type = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {"x": rng.standard_normal((2, 3, k)).astype(dtype), "ids": rng.integers(0, N, (2, 3))}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("dtype", "kind"), [("float", np.float32), ("float16", np.float16)])
def test_head_and_embedding_keep_their_values(bits, dtype, kind):
    text = HEAD + " " + (NARROWED if kind is np.float16 else EMBEDDING)
    given = feeds(dtype=kind)
    lowered = tied(text, bits, dtype=dtype)
    w, scales = (lowered.graph.initializers[name].const_value.numpy() for name in ("w", "scales"))
    assert LowerNBits()(lowered).modified
    assert kinds(lowered) == ["MatMulNBits", "Reshape", "GatherBlockQuantized"], "no Cast behind the rows"
    assert {"w", "scales"}.isdisjoint(lowered.graph.initializers) or kind is np.float16
    blocks = [value for value in lowered.graph.initializers.values() if value.dtype == ir.DataType.UINT8]
    assert [tuple(value.shape.numpy()) for value in blocks] == [(N, 4, 2 * bits)], "one matrix for both"
    y, rows = run(lowered, given, native=False)
    expected = dense_matmul_nbits.OP.reference(given["x"], w, scales, N, K, bits, 16)
    np.testing.assert_allclose(
        y, expected, rtol=0, atol=(1e-6 if kind is np.float32 else 1e-3) * np.abs(expected).max()
    )
    np.testing.assert_array_equal(rows, gather_nbits.OP.reference(given["ids"], w, scales, K, bits, 16).astype(kind))


def test_rows_that_are_read_in_float32_stay_so():
    text = NARROWED + " wide = Cast <to = 1> (h) z = Add (e, wide)"
    given = feeds()
    expected = run(tied(text, 4), given, native=False)
    lowered = tied(text, 4)
    assert LowerNBits()(lowered).modified
    assert kinds(lowered)[:2] == ["Reshape", "GatherBlockQuantized"] and kinds(lowered).count("Cast") == 2
    for got, wanted in zip(run(lowered, given, native=False), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_twice_changes_nothing():
    lowered = tied(HEAD, 4)
    assert LowerNBits()(lowered).modified
    before = spelled(lowered)
    assert not LowerNBits()(lowered).modified and spelled(lowered) == before


@pytest.mark.parametrize(
    ("group", "k", "reason"),
    [
        (24, 48, "groups of 24, and ONNX Runtime takes 16, 32, 64, 128, 256"),
        (512, 512, "groups of 512, and ONNX Runtime takes 16, 32, 64, 128, 256"),
        (32, 80, "80 inputs are no whole number of groups of 32"),
    ],
)
def test_what_onnx_runtime_does_not_take_says_why(group, k, reason):
    left = tied(HEAD, 4, group, k)
    before = spelled(left)
    assert explain(left.graph[0]) == reason
    assert not LowerNBits()(left).modified and spelled(left) == before


def test_computed_weights_are_left():
    text = HEAD.replace("(x, w, scales)", "(x, made, scales)").replace("y =", "made = Identity (w) y =")
    left = tied(text, 4)
    assert explain(left.graph[1]) == "the weights are computed" and not LowerNBits()(left).modified
