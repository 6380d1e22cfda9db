"""The whole path on tiny models: every architecture, both ways to run, against PyTorch; same bytes twice; misses are caught."""

import dataclasses
import hashlib
import json

import numpy as np
import onnx
import pytest
import torch
from evidence import EXECUTED, WHOLE_MODELS, Evidence

import qsparse_export as qs
from qsparse_export import exporter
from qsparse_export.api import as_model
from qsparse_export.config import ModelConfig, MoE, SparsityRule, TopK
from qsparse_export.errors import ParityError, UsageError
from qsparse_export.nn.decoder import Decoder

TINY = ModelConfig(
    architecture="llama",
    vocab_size=96,
    hidden_size=48,
    intermediate_size=130,  # not a multiple of 4, 32 or 64
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=12,
    max_positions=128,
    sparsity=(SparsityRule("*", TopK(0.4)), SparsityRule("*.down_proj", TopK(0.5))),
)
CONFIGS = {
    "llama": TINY,
    "llama-dense": dataclasses.replace(TINY, sparsity=()),
    "qwen2": dataclasses.replace(TINY, architecture="qwen2", qkv_bias=True, tied_embeddings=True),
    "mistral-window": dataclasses.replace(TINY, architecture="mistral", sliding_window=8),
    "block-l2": dataclasses.replace(TINY, sparsity=(SparsityRule("*", TopK(0.5, block=32, rescale="l2")),)),
    "bitnet": dataclasses.replace(
        TINY,
        architecture="bitnet",
        quantization="bitnet",
        activation="relu2",
        sub_norms=True,
        tied_embeddings=True,
        sparsity=(),
    ),
    "bitnet-sparse": dataclasses.replace(TINY, architecture="bitnet", quantization="bitnet", activation="relu2"),
    "moe": dataclasses.replace(TINY, moe=MoE(experts=4, experts_per_token=2)),
    "bitnet-moe": dataclasses.replace(TINY, quantization="bitnet", moe=MoE(experts=3, experts_per_token=1)),
}


def decoder(config, seed=0):
    torch.manual_seed(seed)
    return Decoder(config).eval()


@pytest.fixture(scope="session")
def bundles(tmp_path_factory):
    made = {}

    def make(name):
        if name not in made:
            made[name] = qs.export(decoder(CONFIGS[name]), out=tmp_path_factory.mktemp(name) / "bundle", name=name)
        return made[name]

    return make


@pytest.mark.parametrize("name", CONFIGS)
def test_every_shape_exports_and_is_verified_both_ways(bundles, name, evidence):
    bundle = bundles(name)
    parity = bundle.manifest["parity"]
    assert [path["path"] for path in parity["paths"]] == ["native", "bodies"]
    native, bodies = parity["paths"]
    for path in (native, bodies):
        assert path["relative_logit_error"] <= parity["limit"]
        assert path["greedy_agreement"] == 1.0
    assert bodies["native_calls"] == {}
    uses_ops = name != "llama-dense"
    assert any(op.startswith("Sparse") or op.endswith("TernaryMatMul") for op in native["native_calls"]) == uses_ops
    assert "CachedAttention" in native["native_calls"]
    assert any(op.endswith("TernaryMatMul") for op in native["native_calls"]) == name.startswith("bitnet")
    onnx.checker.check_model(str(bundle.path / "model.onnx"), full_check=True)
    for path, backend in ((native, "ONNX Runtime, C++ kernels"), (bodies, "ONNX Runtime, function bodies")):
        share = path["relative_logit_error"] / parity["limit"]
        evidence(Evidence(WHOLE_MODELS, backend, "x86-64", EXECUTED, error_share=share))


@pytest.mark.parametrize("name", CONFIGS)
def test_generated_tokens_are_those_of_pytorch(bundles, name):
    module = decoder(CONFIGS[name])
    ids = [5, 3, 60, 11]
    expected = list(ids)
    with torch.no_grad():
        for _ in range(16):
            tokens = torch.tensor([expected])
            positions = torch.arange(len(expected))[None]
            logits, _ = module(tokens, torch.ones_like(tokens), positions, past=None)
            expected.append(int(logits[0, -1].argmax()))
    for native in (True, False):
        result = bundles(name).open(threads=1, native=native).generate(ids, max_new_tokens=16, stop_at_eos=False)
        assert list(result.tokens) == expected[4:]


def test_the_graph_has_genais_names_and_named_dimensions(bundles):
    model = onnx.load(bundles("llama").path / "model.onnx", load_external_data=False)

    def dims(value):
        return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]

    inputs = {value.name: dims(value) for value in model.graph.input}
    outputs = {value.name: dims(value) for value in model.graph.output}
    assert inputs == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "total"],
        "position_ids": ["batch", "sequence"],
    } | {f"past_key_values.{i}.{part}": ["batch", 2, "past", 12] for i in range(2) for part in ("key", "value")}
    assert outputs == {"logits": ["batch", "sequence", 96]} | {
        f"present.{i}.{part}": ["batch", 2, "total", 12] for i in range(2) for part in ("key", "value")
    }
    assert {opset.domain: opset.version for opset in model.opset_import} == {"": 23, "ai.qsparse": 1}
    assert {function.name for function in model.functions} == {
        *("TopKSparsify", "SparseMatMul", "CachedAttention", "AddRmsNorm", "GatedActivation")
    }


def test_external_data_is_one_file_with_a_plain_name(bundles):
    model = onnx.load(bundles("llama").path / "model.onnx", load_external_data=False)
    locations = {
        entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    assert locations == {"model.onnx.data"}


def test_tied_embeddings_are_stored_once(bundles):
    model = onnx.load(bundles("qwen2").path / "model.onnx", load_external_data=False)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    assert list(shapes.values()).count((96, 48)) == 1
    # as large as the head: only the joined matrices of q, k and v
    assert all("q_proj+k_proj+v_proj" in name for name, shape in shapes.items() if shape == (48, 96))
    assert not any(node.op_type == "Transpose" for node in model.graph.node if "embed" in "".join(node.input))


def test_shared_masks_are_one_node(bundles):
    model = onnx.load(bundles("llama").path / "model.onnx", load_external_data=False)
    masks = [node for node in model.graph.node if node.op_type in ("TopKSparsify", "SparseMatMul")]
    assert len(masks) == 4 * TINY.layers  # q k v share one, o, gate and up share one, down


def test_nothing_of_this_machine_is_in_the_graph(bundles):
    raw = (bundles("llama").path / "model.onnx").read_bytes()
    for trace in (b"site-packages", b"/home/", b"stack_trace", b".py"):
        assert trace not in raw


def test_same_input_same_bytes(tmp_path):
    """By a new trace, by the one that is kept, and by another new one."""
    digests = []
    for run in range(3):
        if run != 1:
            exporter.trace.cache_clear()
        bundle = qs.export(decoder(CONFIGS["bitnet-sparse"]), out=tmp_path / str(run), name="m", verify="none")
        files = sorted(bundle.path.iterdir())
        digests.append({file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files})
    assert digests[0] == digests[1] == digests[2]


def test_batches_with_padding_and_a_cache_run(bundles):
    """Dynamic batch, sequence and past at once: a left-padded row gives the logits of the row alone."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(bundles("llama").path / "model.onnx"))
    empty = np.zeros((2, 2, 0, 12), np.float32)
    feeds = {
        "input_ids": np.array([[0, 0, 5], [7, 8, 9]]),
        "attention_mask": np.array([[0, 0, 1], [1, 1, 1]]),
        "position_ids": np.array([[0, 0, 0], [0, 1, 2]]),
    } | {f"past_key_values.{i}.{part}": empty for i in range(2) for part in ("key", "value")}
    logits = session.run(["logits"], feeds)[0]
    alone = bundles("llama").open(native=False).logits([5])
    np.testing.assert_allclose(logits[0, 2], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "bitnet-sparse"])
def test_fp16_exports_and_is_verified(tmp_path, name):
    bundle = qs.export(decoder(CONFIGS[name]), out=tmp_path / "b", weights="fp16")
    assert bundle.manifest["dtype"] == "float16"
    assert bundle.manifest["parity"]["paths"][0]["greedy_agreement"] > 0.6


def test_ternary_weights_can_be_asked_for(tmp_path):
    bundle = qs.export(decoder(CONFIGS["llama"]), out=tmp_path / "b", weights="ternary")
    assert "SparseTernaryMatMul" in bundle.manifest["parity"]["paths"][0]["native_calls"]


def test_contradicting_weights_are_refused(tmp_path):
    with pytest.raises(UsageError, match="ternary weights"):
        qs.export(decoder(CONFIGS["bitnet"]), out=tmp_path / "b", weights="fp32")


def test_portable_bundles_hold_no_library_and_run_bodies(tmp_path):
    bundle = qs.export(decoder(CONFIGS["bitnet"]), out=tmp_path / "b", portable=True)
    assert not [file for file in bundle.manifest["files"] if file.endswith((".so", ".dylib"))]
    assert [path["path"] for path in bundle.manifest["parity"]["paths"]] == ["bodies"]
    assert bundle.open().generate([1, 2], 4).native_calls == {}
    assert "custom_ops_library" not in (bundle.path / "genai_config.json").read_text()


def test_manifest_says_what_was_made(bundles):
    bundle = bundles("bitnet-sparse")
    manifest = bundle.manifest
    assert manifest["schema"] == 1 and manifest["target"]["name"] == "cpu" and manifest["runtime"] == "ort"
    assert set(manifest["files"]) >= {"model.onnx", "model.onnx.data", "genai_config.json"}
    assert manifest["source"]["sha256"] and manifest["tools"]["onnxruntime"]
    rows = {row["name"]: row for row in manifest["sparsity"]}
    assert rows["model.layers.1.mlp.down_proj"] == {
        "name": "model.layers.1.mlp.down_proj",
        "width": 130,
        "k": 65,
        "block": 0,
        "rescale": "none",
        "sparse_ratio": 0.5,
    }
    assert json.loads((bundle.path / "manifest.json").read_text()) == manifest


@pytest.mark.parametrize(("layer", "name"), [(0, "llama"), (1, "bitnet-sparse")])
def test_a_wrong_weight_fails_the_export_and_the_layer_is_named(tmp_path, monkeypatch, layer, name):
    """The exporter is made to write another matrix than the checkpoint's: parity must say so, and where."""
    from qsparse_export.nn import deploy

    honest = deploy.deployed_tensor

    def altered(tensor_name, *rest):
        tensor = honest(tensor_name, *rest)
        return tensor.flip(0) if f"layers.{layer}.mlp.up_proj" in tensor_name and tensor.ndim == 2 else tensor

    original = deploy.materialize

    def materialize_honestly(*arguments):
        with monkeypatch.context() as inner:
            inner.setattr(deploy, "deployed_tensor", honest)
            return original(*arguments)

    monkeypatch.setattr(deploy, "deployed_tensor", altered)
    monkeypatch.setattr(deploy, "materialize", materialize_honestly)
    with pytest.raises(ParityError, match=f"first diverges at the output of layer {layer}"):
        qs.export(decoder(CONFIGS[name]), out=tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


class Plain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(20, 33)
        self.second = torch.nn.Linear(33, 7)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


@pytest.mark.parametrize("quantization", ["none", "bitnet"])
def test_any_module_can_be_sparsified_and_exported(tmp_path, quantization):
    torch.manual_seed(0)
    module = qs.sparsify(Plain(), (SparsityRule("*", TopK(0.5)),), quantization)
    x = torch.randn(5, 20)
    bundle = qs.export(module, out=tmp_path / "b", example_inputs=(x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert bundle.manifest["kind"] == "module"
    for path in bundle.manifest["parity"]["paths"]:
        assert path["relative_error"] <= bundle.manifest["parity"]["limit"]
    import onnxruntime

    session = onnxruntime.InferenceSession(str(bundle.path / "model.onnx"))
    y = session.run(None, {session.get_inputs()[0].name: np.zeros((0, 20), np.float32)})[0]
    assert y.shape == (0, 7)


def test_a_module_without_example_inputs_is_refused(tmp_path):
    with pytest.raises(UsageError, match="example_inputs"):
        qs.export(Plain(), out=tmp_path / "b")
    with pytest.raises(UsageError, match="cannot export a str"):
        as_model("text")
