"""The whole path with n-bit weights on tiny models: what the file holds, what the manifest says, and that misses are caught."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

import qsparse_export as qs
from qsparse_export.bundle import Bundle
from qsparse_export.cli.export import main
from qsparse_export.config import ModelConfig, MoE, SparsityRule, TopK
from qsparse_export.errors import CheckpointError, ParityError, UsageError
from qsparse_export.formats import nbits
from qsparse_export.nn import deploy
from qsparse_export.nn.decoder import Decoder

LLAMA = ModelConfig(
    architecture="llama",
    vocab_size=96,
    hidden_size=48,
    intermediate_size=130,  # not a multiple of 4, 32 or 64
    layers=3,  # the last one is a repeated layer
    heads=4,
    kv_heads=2,
    head_dim=12,
    max_positions=128,
    sparsity=(SparsityRule("*", TopK(0.4)), SparsityRule("*.down_proj", TopK(0.5))),
)
TIED = dataclasses.replace(LLAMA, architecture="qwen2", qkv_bias=True, tied_embeddings=True)
BITNET = dataclasses.replace(TIED, architecture="bitnet", qkv_bias=False, quantization="bitnet", activation="relu2")
MOE = dataclasses.replace(LLAMA, layers=1, moe=MoE(experts=3, experts_per_token=2))
L2 = dataclasses.replace(LLAMA, layers=1, sparsity=(SparsityRule("*", TopK(0.5, block=32, rescale="l2")),))


def decoder(config: ModelConfig) -> Decoder:
    torch.manual_seed(0)
    made = Decoder(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return made


def initializers(bundle: Bundle) -> dict[str, TensorProto]:
    model = onnx.load(bundle.path / "model.onnx", load_external_data=False)
    return {tensor.name: tensor for tensor in model.graph.initializer}


@pytest.fixture(scope="session")
def bundles(tmp_path_factory):
    made = {}

    def make(name: str) -> Bundle:
        config, options = {
            "int4": (LLAMA, {"weights": "int4"}),
            "int8": (LLAMA, {"weights": "int8", "head": "keep"}),
            "tied": (TIED, {"weights": "int8", "head": "int4"}),
            "bitnet": (BITNET, {"head": "int4"}),
            "moe": (MOE, {"weights": "int4"}),
            "l2": (L2, {"weights": "int4"}),
            "fp16": (LLAMA, {"weights": "int4", "activations": "fp16"}),
            "fp16-tied": (TIED, {"weights": "int4", "activations": "fp16"}),
        }[name]
        if name not in made:
            made[name] = qs.export(decoder(config), out=tmp_path_factory.mktemp(name) / "bundle", name=name, **options)
        return made[name]

    return make


@pytest.mark.parametrize("name", ["int4", "int8", "tied", "bitnet", "moe", "l2", "fp16", "fp16-tied"])
def test_every_choice_exports_and_is_verified_both_ways(bundles, name):
    parity = bundles(name).manifest["parity"]
    native, bodies = parity["paths"]
    assert (native["path"], bodies["path"]) == ("native", "bodies")
    assert all(path["relative_logit_error"] <= parity["limit"] for path in parity["paths"])
    assert parity["limit"] <= (5e-4 if "fp16" not in name else 0.1)
    used = {"SparseTernaryMatMul"} if name == "bitnet" else {"SparseMatMulNBits"}
    used |= set() if name == "int8" else {"DenseMatMulNBits"}
    assert used <= native["native_calls"].keys() and bodies["native_calls"] == {}


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_the_file_holds_packed_codes_of_their_own_type(bundles, name):
    bundle = bundles(name)
    bits, kind = (4, TensorProto.INT4) if name == "int4" else (8, TensorProto.INT8)
    codes = {n: t for n, t in initializers(bundle).items() if n.endswith(".packed")}
    assert codes and {t.data_type for t in codes.values()} == {kind}
    # Each block's matrices, however they are joined, padded to 64 outputs: q 48 and k, v 24 of 48 inputs, and so on.
    widths = {48: 3 * 64 + 64 + 2 * 192, 130: 64}
    for inputs, width in widths.items():
        rows = [t for t in codes.values() if t.dims[0] == inputs]
        assert sum(t.dims[1] for t in rows) == LLAMA.layers * width
        for tensor in rows:
            (length,) = (int(entry.value) for entry in tensor.external_data if entry.key == "length")
            assert length == inputs * tensor.dims[1] * bits // 8


def test_the_file_holds_the_codes_of_the_quantiser(bundles):
    """Read back from the file by the format's own unpacking, against the weights of the checkpoint."""
    bundle = bundles("int4")
    model = onnx.load(bundle.path / "model.onnx")
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    (name,) = [n for n in tensors if n.startswith("model.layers.2.mlp.down_proj") and n.endswith(".packed")]
    packed = np.frombuffer(tensors[name].raw_data, np.uint8).reshape(130, -1)
    scales = onnx.numpy_helper.to_array(tensors[name.replace(".packed", ".scales")])
    codes = nbits.unpack_channels(packed, 48, 4)
    weight = decoder(LLAMA).state_dict()["model.layers.2.mlp.down_proj.weight"].numpy()
    lost = codes * scales[np.arange(130) // 32, :48].T.astype(np.float64) - weight
    rows = {row["name"]: row for row in bundle.manifest["quantization"]["layers"]}
    expected = rows["model.layers.2.mlp.down_proj"]["relative_error"]
    assert np.linalg.norm(lost) / np.linalg.norm(weight) == pytest.approx(expected, rel=1e-4)
    assert 0.05 < expected < 0.1


@pytest.mark.parametrize("name", ["tied", "bitnet"])
def test_a_tied_embedding_is_stored_once(bundles, name):
    tensors = initializers(bundles(name))
    model = onnx.load(bundles(name).path / "model.onnx", load_external_data=False)
    readers = {n.op_type: list(n.input) for n in model.graph.node if n.op_type in ("GatherNBits", "DenseMatMulNBits")}
    assert readers["GatherNBits"][1:] == readers["DenseMatMulNBits"][1:]
    assert list(tensors[readers["GatherNBits"][1]].dims) == [96, 24]
    others = {n: list(t.dims) for n, t in tensors.items() if "embed" in n or "head" in n}
    assert others == {"model.embed_tokens.rows": [96, 24], "model.embed_tokens.row_scales": [96, 2]}


def test_an_embedding_of_its_own_stays_in_floating_point(bundles):
    tensors = initializers(bundles("int4"))
    assert tensors["model.embed_tokens.weight"].data_type == TensorProto.FLOAT
    assert tensors["lm_head.rows"].data_type == TensorProto.UINT8


def test_the_router_of_a_mixture_stays_in_floating_point(bundles):
    tensors = initializers(bundles("moe"))
    assert tensors["model.layers.0.mlp.gate.weight_t"].data_type == TensorProto.FLOAT
    names = {row["name"] for row in bundles("moe").manifest["quantization"]["layers"]}
    assert "model.layers.0.mlp.experts.2.down_proj" in names and "model.layers.0.mlp.gate" not in names


def test_the_manifest_says_what_was_quantised_and_what_that_lost(bundles):
    bundle = bundles("int4")
    manifest = bundle.manifest
    assert (manifest["weights"], manifest["head"], manifest["dtype"]) == ("int4", "int8", "float32")
    table = manifest["quantization"]
    assert (table["bits"], table["group"], table["head"]) == (4, 32, {"bits": 8, "group": 128})
    rows = {row["name"]: row for row in table["layers"]}
    assert len(rows) == 7 * LLAMA.layers + 1
    assert all(0.05 < row["relative_error"] < 0.1 for name, row in rows.items() if name != "lm_head")
    assert rows["lm_head"]["bits"] == 8 and 0.002 < rows["lm_head"]["relative_error"] < 0.01
    assert 0 < table["logits"]["relative_error"] < 1 and 0 < table["logits"]["argmax_agreement"] <= 1
    assert json.loads((bundle.path / "manifest.json").read_text()) == manifest


def test_logits_are_compared_with_the_model_that_came(bundles):
    """The figure of the manifest, measured again: the bundle against the float model, on the prompt of verification."""
    bundle = bundles("int8")
    prompt = np.random.default_rng(0).integers(0, 96, 24)
    with torch.no_grad():
        original = decoder(LLAMA)(torch.from_numpy(prompt).unsqueeze(0))[0][0].numpy()
    got = bundle.open(native=False).logits(prompt)
    error = float(np.linalg.norm(got - original) / np.linalg.norm(original))
    recorded = bundle.manifest["quantization"]["logits"]["relative_error"]
    assert error == pytest.approx(recorded, rel=0.02)


def test_nothing_quantised_is_said_so(tmp_path):
    manifest = qs.export(decoder(L2), out=tmp_path / "b", verify="none").manifest
    assert (manifest["weights"], manifest["head"], manifest["quantization"]) == ("keep", "keep", None)


def test_same_input_same_bytes(tmp_path, bundles):
    again = qs.export(decoder(LLAMA), out=tmp_path / "b", name="int4", weights="int4", verify="none")
    hashes = [{n: f["sha256"] for n, f in b.manifest["files"].items() if "onnx" in n} for b in (again, bundles("int4"))]
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("leaf", ["packed", "scales"])
def test_a_wrong_code_or_scale_fails_the_export(tmp_path, monkeypatch, leaf):
    honest, original = deploy.deployed_tensor, deploy.materialize

    def altered(name, *rest):
        tensor = honest(name, *rest)
        return tensor.flip(0) if name == f"model.layers.1.mlp.down_proj.{leaf}" else tensor

    def materialize_honestly(*arguments):
        with monkeypatch.context() as inner:
            inner.setattr(deploy, "deployed_tensor", honest)
            return original(*arguments)

    monkeypatch.setattr(deploy, "deployed_tensor", altered)
    monkeypatch.setattr(deploy, "materialize", materialize_honestly)
    with pytest.raises(ParityError, match="first diverges at the output of layer 1"):
        qs.export(decoder(LLAMA), out=tmp_path / "b", weights="int4")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_no_scale_can_hold_leave_nothing_behind(tmp_path):
    broken = decoder(LLAMA)
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[3, 5] = 1e9
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight holds a weight of magnitude 1e\+09"):
        qs.export(broken, out=tmp_path / "b", weights="int4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("config", "options"), [(LLAMA, {"weights": "int4"}), (BITNET, {})], ids=["int4", "bitnet"])
def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path, config, options):
    """Tiny scales are made from them too, and those must not be read where the error would become another."""
    broken = decoder(config)
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight holds 1 NaN or Inf"):
        qs.export(broken, out=tmp_path / "b", **options)
    assert list(tmp_path.iterdir()) == []


def test_contradictions_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UsageError, match="2 bits without any loss"):
        qs.export(decoder(BITNET), out=tmp_path / "b", weights="int4")
    module = torch.nn.Linear(8, 8)
    for options in ({"head": "int8"}, {"activations": "fp16"}, {"weights": "int4"}):
        with pytest.raises(UsageError, match="need"):
            qs.export(module, out=tmp_path / "b", example_inputs=(torch.zeros(2, 8),), **options)
    assert list(tmp_path.iterdir()) == []


def test_the_command_shows_a_summary_and_prints_the_table(tmp_path):
    qs.save(decoder(L2), L2, tmp_path / "m.pt")
    words = [str(tmp_path / "m.pt"), "--weights", "int4", "--head", "int4", "--verify", "quick"]
    shown, printed = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(shown):
        assert main([*words, "-o", str(tmp_path / "a")]) == 0
    text = " ".join(shown.getvalue().split())
    assert "weights in 4 bits, head in 4 bits: relative error" in text and "on average" in text and "argmax" in text
    with contextlib.redirect_stdout(printed):
        assert main([*words, "--json", "-o", str(tmp_path / "b")]) == 0
    table = json.loads(printed.getvalue())["quantization"]
    worst = max(table["layers"], key=lambda row: row["relative_error"])
    assert worst["name"] in text and f"{worst['relative_error']:.2%}" in text
