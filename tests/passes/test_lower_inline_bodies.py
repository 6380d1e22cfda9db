"""inline-bodies: only standard ops are left, with the same bits; the 2-bit form is near; verification finds the choices."""

import dataclasses
import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from graph_text import graph_of, kinds, run, spelled

import qsparse_export as qs
from qsparse_export.config import ModelConfig, SparsityRule, TopK
from qsparse_export.errors import UsageError
from qsparse_export.formats.ternary import pack
from qsparse_export.guided import choice_taps
from qsparse_export.nn.decoder import Decoder
from qsparse_export.passes.lower_inline_bodies import InlineBodies
from qsparse_export.passes.pipelines import pipeline_for

K = 300  # no multiple of a block of 128
TEXT = (
    'y = ai.qsparse.SparseTernaryMatMul <k = 120, block = 0, rescale = "none", n = [130, 7]> (x, w, s) '
    "z = ai.qsparse.TernaryMatMul <n = 7> (x, w2, s2)"
)
SIGNATURE = f"(float[M, {K}] x) => (float[M, 137] y, float[M, 7] z)"


def ternary(seed: int = 0) -> ir.Model:
    rng = np.random.default_rng(seed)
    parts = [pack(rng.integers(-1, 2, (n, K)).astype(np.int8)) for n in (130, 7)]
    weights = {"w": np.concatenate(parts, axis=1), "s": np.array([0.02, 0.3], np.float32)}
    return graph_of(SIGNATURE, TEXT, weights | {"w2": parts[1].copy(), "s2": np.array([0.5], np.float32)})


def feeds(dtype: type = np.float32) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(1).standard_normal((3, K)).astype(dtype)}


def test_only_standard_ops_are_left_with_the_same_bits():
    graph = ternary()
    for node in graph.graph:
        node.metadata_props["ai.qsparse.scope"] = f"model.{node.op_type}"
    expected = run(ternary(), feeds(), False)
    taps = choice_taps(graph)
    assert InlineBodies()(graph).modified
    assert not graph.functions and {node.domain for node in graph.graph.all_nodes()} == {""}
    assert "ai.qsparse" not in graph.opset_imports and kinds(graph).count("MatMulInteger") == 2
    for got, wanted in zip(run(graph, feeds(), False), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert choice_taps(graph) == taps and [tap.op for tap in taps] == ["TopKSparsify", *["TernaryMatMul"] * 3]
    assert {node.metadata_props.get("ai.qsparse.scope") for node in graph.graph} == {
        "model.SparseTernaryMatMul",
        "model.TernaryMatMul",
    }
    before = spelled(graph)
    assert not InlineBodies()(graph).modified and spelled(graph) == before


def test_two_bits_of_the_runtime_are_near_and_stay_packed():
    """MatMulNBits quantises activations in blocks of 128, not in rows: near, and not the same integers."""
    expected = run(ternary(), feeds(), False)
    graph = ternary()
    assert InlineBodies(ternary="nbits")(graph).modified
    assert kinds(graph).count("MatMulNBits") == 2 and "MatMulInteger" not in kinds(graph)
    sizes = {name: value.const_value.nbytes for name, value in graph.graph.initializers.items() if value.const_value}
    assert sizes["w.nbits"] == 137 * 3 * 32, "2 bits, K padded to three blocks"
    for got, wanted in zip(run(graph, feeds(), False), expected, strict=True):
        error = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
        assert 0 < error < 2e-2
    assert "ai.qsparse.choices" not in graph.metadata_props, "its choices are other ones"


def test_a_graph_without_our_ops_is_left_alone_and_forms_have_names():
    graph = graph_of("(float[M] x) => (float[M] y)", "y = Neg (x)")
    before = spelled(graph)
    assert not InlineBodies()(graph).modified and spelled(graph) == before
    with pytest.raises(UsageError, match="ternary=int2; expected one of integer, nbits"):
        InlineBodies(ternary="int2")(graph)


@pytest.mark.parametrize("quantization", ["none", "bitnet"])
def test_a_decoder_without_our_ops_is_verified_like_any_other(tmp_path, quantization):
    config = ModelConfig(
        architecture="llama",
        vocab_size=40,
        hidden_size=16,
        intermediate_size=26,
        layers=2,
        heads=2,
        kv_heads=1,
        head_dim=8,
        max_positions=64,
        activation="relu2",
        sparsity=(SparsityRule("*", TopK(0.4)),),
    )
    torch.manual_seed(0)
    decoder = Decoder(dataclasses.replace(config, quantization=quantization))
    pipeline = pipeline_for(()).replace("attach-bodies", "inline-bodies")
    bundle = qs.export(decoder, out=tmp_path / "b", portable=True, pipeline=pipeline)
    model = onnx.load(bundle.path / "model.onnx", load_external_data=False)
    assert not model.functions and {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    (path,) = bundle.manifest["parity"]["paths"]
    assert path["choices"] > 0 and path["greedy_agreement"] == 1.0
    recorded = json.loads({prop.key: prop.value for prop in model.metadata_props}["ai.qsparse.choices"])
    assert len(recorded) >= 2 * 4
