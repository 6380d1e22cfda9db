"""A model.onnx of another exporter, from the file to the bundle: fused, judged by the original file, the same on every run."""

import hashlib
import json

import foreign_models
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from foreign_models import WIDTH, QSparseMLP, export
from torch import nn

import qsparse_export as qs
from qsparse_export.bundle import Bundle
from qsparse_export.errors import ParityError, UsageError
from qsparse_export.example_inputs import example_feeds
from qsparse_export.loader import load
from qsparse_export.original import Original
from qsparse_export.passes import fuse_topk, fuse_topk_masks
from qsparse_export.passes.original_choices import MaskChoice, RoundingChoice


@pytest.fixture(scope="session")
def official(tmp_path_factory):
    """The official Q-Sparse code through the dynamo exporter, as a user saves it."""
    path = tmp_path_factory.mktemp("official") / "model.onnx"
    onnx.save(export(QSparseMLP()), path)
    return path


def outputs(path, feeds, library=None):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if library:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(path, options).run(None, feeds)


def ops(bundle: Bundle) -> list[str]:
    model = onnx.load(bundle.path / "model.onnx", load_external_data=False)
    return [node.op_type for node in model.graph.node]


def sha256(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_official_q_sparse_comes_out_fused_with_the_same_outputs(official, tmp_path):
    bundle = qs.export(load(official), out=tmp_path / "bundle")
    assert not {"TopK", "ScatterElements", "Sub"} & set(ops(bundle))
    manifest = bundle.manifest
    assert (manifest["kind"], manifest["source"]["format"]) == ("module", "onnx")
    parity = manifest["parity"]
    assert parity["judge"] == "the original file, run by ONNX Runtime"
    assert (parity["choices"], parity["followed"], manifest["unfused"]) == (4, 4, {})
    assert [path["path"] for path in parity["paths"]] == ["native", "bodies"]
    assert parity["paths"][0]["native_calls"] and not parity["paths"][1]["native_calls"]
    x = np.random.default_rng(9).normal(size=(4, 5, WIDTH)).astype(np.float32)
    (name,) = [value.name for value in onnx.load(official).graph.input]
    (expected,) = outputs(official, {name: x})
    for library in (None, next(bundle.path.glob("*.so"))):
        (got,) = outputs(bundle.path / "model.onnx", {name: x}, library)
        assert np.linalg.norm(got - expected) <= parity["limit"] * np.linalg.norm(expected)


def test_opset_17_of_the_torchscript_exporter(tmp_path):
    path = tmp_path / "old.onnx"
    onnx.save(export(QSparseMLP(), 17, dynamo=False), path)
    bundle = qs.export(load(path), out=tmp_path / "bundle", verify="quick")
    assert not {"TopK", "ScatterElements"} & set(ops(bundle))
    assert bundle.manifest["parity"]["followed"] == 4


def test_external_data_of_the_original(tmp_path):
    proto = export(QSparseMLP())
    onnx.save(proto, tmp_path / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=64)
    bundle = qs.export(load(tmp_path / "model.onnx"), out=tmp_path / "bundle", verify="quick")
    assert bundle.manifest["parity"]["followed"] == 4


@pytest.mark.parametrize("storage", ["divide", "online"])
def test_a_bitnet_of_transformers(tmp_path, storage):
    from bitnet_folders import masters, write

    class Logits(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits

    model = write(tmp_path / "folder", masters(hidden_size=64, intermediate_size=172), storage)
    path = tmp_path / "bitnet.onnx"
    onnx.save(export(Logits(model), 18, args=(torch.randint(0, 64, (2, 9)),)), path)
    bundle = qs.export(load(path), out=tmp_path / "bundle")
    made = ops(bundle)
    assert (made.count("SparseTernaryMatMul"), made.count("TernaryMatMul")) == (4, 4)  # q k v, gate up; o, down
    assert not {"Round", "BitwiseAnd", "ScatterND"} & set(made)
    parity = bundle.manifest["parity"]
    assert (parity["choices"], parity["followed"]) == (14, 14)
    ids = np.random.default_rng(2).integers(0, 64, (2, 11))
    (name,) = [value.name for value in onnx.load(path).graph.input]
    (expected,) = outputs(path, {name: ids})
    (got,) = outputs(bundle.path / "model.onnx", {name: ids})
    assert np.array_equal(got.argmax(-1), expected.argmax(-1))


def test_a_model_without_a_pattern_passes_through(tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 3))
    path = tmp_path / "plain.onnx"
    proto = export(module)
    onnx.save(proto, path)
    bundle = qs.export(load(path), out=tmp_path / "bundle")
    assert sorted(ops(bundle)) == sorted(node.op_type for node in proto.graph.node)
    assert bundle.manifest["unfused"] == {} and bundle.manifest["parity"]["choices"] == 0
    assert all(path["max_error"] == 0 for path in bundle.manifest["parity"]["paths"])


def test_what_is_left_is_in_the_manifest(tmp_path):
    def threshold(x):
        return torch.where(x.abs() >= x.abs().topk(10, dim=-1).values[..., -1:], x, 0.0)

    path = tmp_path / "threshold.onnx"
    onnx.save(export(foreign_models.Masked(threshold)), path)
    bundle = qs.export(load(path), out=tmp_path / "bundle", verify="quick")
    (reason,) = bundle.manifest["unfused"].values()
    assert "keeps every tie" in reason


def test_a_wrong_rewrite_is_caught_and_nothing_is_written(official, tmp_path, monkeypatch):
    right = fuse_topk_masks.selection

    def wrong(topk):
        mask = right(topk)
        return fuse_topk_masks.Mask(mask.topk, mask.source, mask.k - 1)

    monkeypatch.setattr(fuse_topk_masks, "selection", wrong)
    with pytest.raises(ParityError, match="differs from the original file"):
        qs.export(load(official), out=tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_the_pipeline_in_the_manifest_makes_the_same_bytes_again(official, tmp_path):
    first = qs.export(load(official), out=tmp_path / "first", verify="none")
    again = qs.export(load(official), out=tmp_path / "again", verify="none", pipeline=first.manifest["pipeline"])
    assert again.manifest["pipeline"] == first.manifest["pipeline"]
    for name in ("model.onnx", "model.onnx.data"):
        assert sha256(first.path / name) == sha256(again.path / name)
    edited = "default,-fuse-sparse-matmul,-fuse-sparse-ternary"
    plain = qs.export(load(official), out=tmp_path / "plain", verify="none", pipeline=edited)
    assert "fuse-sparse-matmul" not in plain.manifest["pipeline"] and "fuse-topk" in plain.manifest["pipeline"]
    assert ops(plain).count("TopKSparsify") == 4
    same = qs.export(load(official), out=tmp_path / "same", verify="none", pipeline=plain.manifest["pipeline"])
    assert sha256(same.path / "model.onnx") == sha256(plain.path / "model.onnx")


def test_a_bundle_is_an_input_as_well(official, tmp_path):
    first = qs.export(load(official), out=tmp_path / "first", verify="none")
    second = qs.export(load(first.path / "model.onnx"), out=tmp_path / "second")
    assert ops(second) == ops(first)
    assert second.manifest["parity"]["choices"] == 0


def test_given_inputs_are_used_and_wrong_ones_named(official, tmp_path):
    (name,) = [value.name for value in onnx.load(official).graph.input]
    x = np.ones((1, 2, WIDTH), np.float32)
    qs.export(load(official), out=tmp_path / "bundle", example_inputs={name: x}, verify="quick")
    with pytest.raises(UsageError, match="no input other"):
        qs.export(load(official), out=tmp_path / "wrong", example_inputs={"other": x})
    with pytest.raises(UsageError, match="float32, and float64 was given"):
        qs.export(load(official), out=tmp_path / "wrong", example_inputs={name: x.astype(np.float64)})
    with pytest.raises(UsageError, match="by name"):
        qs.export(load(official), out=tmp_path / "wrong", example_inputs=(x,))
    with pytest.raises(ParityError, match="does not run on the example inputs"):
        qs.export(load(official), out=tmp_path / "wrong", example_inputs={name: x[..., :7]})
    with pytest.raises(UsageError, match="needs a checkpoint"):
        qs.export(load(official), out=tmp_path / "wrong", weights="fp16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


def test_inputs_are_made_up_from_types_shapes_and_names():
    import onnx_ir as ir

    proto = onnx.parser.parse_model("""
      <ir_version: 10, opset_import: ["" : 23]>
      g (int64[batch, sequence] input_ids, int64[batch, "past + sequence"] attention_mask, int64[batch, sequence] position_ids,
         float16[batch, 2, past, 4] cache, bool[1] flag) => (float[batch, sequence, 8] y)
      <float[50, 8] table> { y = Gather (table, input_ids) }
    """)
    feeds = example_feeds(ir.from_proto(proto).graph, None)
    assert {name: array.shape for name, array in feeds.items()} == {
        "input_ids": (2, 3),
        "attention_mask": (2, 8),
        "position_ids": (2, 3),
        "cache": (2, 2, 5, 4),
        "flag": (1,),
    }
    assert feeds["input_ids"].max() > 2 and feeds["input_ids"].max() < 50
    assert feeds["attention_mask"].all() and feeds["flag"].all()
    assert feeds["position_ids"].tolist() == [[0, 1, 2]] * 2
    assert feeds["cache"].dtype == np.float16


SPARSE_TERNARY = """
  <ir_version: 10, opset_import: ["" : 23]>
  g (float[M, 4] x) => (float[M, 4] y)
  <int64[1] k = {2}, float zero = {0.0}, float one = {1.0}> {
    magnitude = Abs (x)
    values, indices = TopK (magnitude, k)
    shape = Shape (x)
    zeros = ConstantOfShape (shape)
    index_shape = Shape (indices)
    ones = Expand (one, index_shape)
    mask = ScatterElements <axis = -1> (zeros, indices, ones)
    masked = Mul (x, mask)
    again = Mul (x, mask)
    scaled = Add (masked, again)
    y = Round (scaled)
  }
"""


@pytest.fixture
def original(tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(onnx.parser.parse_model(SPARSE_TERNARY), path)
    choices = (MaskChoice("x", "x", ("masked",)), RoundingChoice("scaled", "y"))
    return Original(path, choices)


def test_the_original_follows_another_choice_in_every_place_that_computes_the_same(original):
    x = np.array([[3.0, 1.0, -2.0, 2.0]], np.float32)
    (free,) = original.run({"x": x}).values()
    assert free.tolist() == [[6.0, 0.0, -4.0, 0.0]]
    other = np.array([[True, False, False, True]])
    got = original.follow({"x": x}, [other, np.array([[5.0, 0.0, 0.0, 4.0]], np.float32)], optimise=True)
    mask_seen, rounding_seen = (got[entry.seen] for entry in original.followed)
    assert mask_seen.tolist() == x.tolist()
    assert got[original.followed[0].free].tolist() == [[3.0, 0.0, -2.0, 0.0]]  # its own, before it followed
    assert rounding_seen.tolist() == [[6.0, 0.0, 0.0, 4.0]]  # both products took the other mask


def test_choices_that_the_original_does_not_name_are_left_to_it(tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(onnx.parser.parse_model(SPARSE_TERNARY), path)
    judge = Original(path, (MaskChoice("x", "x", ("nowhere",)),))
    assert judge.followed == ()
    assert judge.follow({"x": np.ones((1, 4), np.float32)}, [], optimise=True)["y"].tolist() == [[2.0, 2.0, 0.0, 0.0]]


def test_the_command_line(official, tmp_path, capfd):
    from qsparse_export.cli.export import main

    (name,) = [value.name for value in onnx.load(official).graph.input]
    np.savez(tmp_path / "inputs.npz", **{name: np.ones((1, 2, WIDTH), np.float32)})
    out, dump, text = tmp_path / "bundle", tmp_path / "dump", tmp_path / "graph.txt"
    arguments = [str(official), "-o", str(out), "--verify", "quick", "--json", "--inputs", str(tmp_path / "inputs.npz")]
    arguments += ["--passes", "default,-fuse-sparse-matmul", "--dump", str(dump)]
    arguments += ["--print-after", "fuse-topk", "--print-after", f"all={text}"]
    assert main(arguments) == 0
    printed = capfd.readouterr()
    manifest = json.loads(printed.out)
    assert "fuse-sparse-matmul" not in manifest["pipeline"]
    steps = manifest["pipeline"].split(",")
    assert sorted(file.name for file in dump.iterdir()) == [f"{i:02d}-{step}.onnx" for i, step in enumerate(steps, 1)]
    for file in dump.iterdir():
        onnx.checker.check_model(str(file))
        assert file.stat().st_size < 100_000  # the weights are 300 kB
    after = onnx.load(dump / f"{steps.index('fuse-topk') + 1:02d}-fuse-topk.onnx")
    assert "TopKSparsify" in {node.op_type for node in after.graph.node}
    assert printed.err.count("ai.qsparse.TopKSparsify <") == 4 and "// 8 fuse-topk" in printed.err
    assert text.read_text().count("\n// ") == len(steps) - 1


def test_what_to_show_is_checked_before_anything_runs(official, tmp_path, capfd):
    from qsparse_export.cli.export import main

    assert main([str(official), "--print-after", "fuse-topp"]) == 2
    assert "did you mean fuse-topk" in capfd.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert main([str(official), "--dump", str(tmp_path / "full")]) == 2
    assert main([str(official), "--inputs", str(official), "-o", str(tmp_path / "b")]) == 2
    assert "expected a file of numpy.savez" in capfd.readouterr().err
    assert fuse_topk.FuseTopK.name == "fuse-topk"
