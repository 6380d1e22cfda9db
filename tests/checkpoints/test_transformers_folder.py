"""Folders written by transformers: configuration, weights and logits against transformers itself; hostile folders."""

import json
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import qsparse_export as qs
from qsparse_export.checkpoints.transformers_config import read_config
from qsparse_export.config import RopeScaling, SparsityRule, TopK
from qsparse_export.errors import CheckpointError, QSparseError
from qsparse_export.nn.deploy import materialize
from qsparse_export.sparsity import parse_sparsity

transformers = pytest.importorskip("transformers", reason="the oracle of these tests, from the extra [hf]")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 42,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 500.0,
}
FOLDERS = {
    "llama": ("Llama", {}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama-head-dim": ("Llama", {"head_dim": 10, "eos_token_id": [2, 5]}),
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3}),
    "linear-rope": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0}}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "mistral-full": ("Mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}),
    "bitnet-unquantised": ("BitNet", {}),
}


def randomised(kind, changes, dtype=torch.float32):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(SIZES | changes))
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for tensor in model.parameters():  # zero biases and unit norms would hide mistakes
        tensor.data = torch.randn_like(tensor) * 0.1 + (1.0 if tensor.dim() == 1 else 0.0)
    return model.to(dtype)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    made = {}

    def write(name):
        if name not in made:
            model = randomised(*FOLDERS[name])
            folder = tmp_path_factory.mktemp("folders") / name
            model.save_pretrained(folder)
            made[name] = (model, folder)
        return made[name]

    return write


@pytest.mark.parametrize("name", FOLDERS)
def test_weights_and_logits_are_those_of_transformers(written, name):
    theirs, folder = written(name)
    model = qs.load(folder)
    assert (model.name, model.source_format, model.config.quantization) == (name, "transformers", "none")
    state = theirs.state_dict()
    assert model.weights.shapes.keys() == {
        n for n in state if n != "lm_head.weight" or not model.config.tied_embeddings
    }
    for tensor in model.weights.shapes:
        assert torch.equal(model.weights.read(tensor), state[tensor])
    ids = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = materialize(model.config, model.weights, torch.float32)(ids)[0]
        expected = theirs(ids).logits
    assert (ours - expected).norm() < 1e-5 * expected.norm()


def test_configuration_values(written):
    config = qs.load(written("llama3-rope")[1]).config
    assert config.rope_theta == 500.0 and config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 32)
    assert qs.load(written("mistral")[1]).config.sliding_window == 5
    assert qs.load(written("qwen2-window")[1]).config.sliding_window == 4
    assert qs.load(written("qwen2")[1]).config.qkv_bias
    config = qs.load(written("llama-head-dim")[1]).config
    assert (config.head_dim, config.bos_token_id, config.eos_token_ids) == (10, 1, (2, 5))
    assert config.norm_eps == 1e-6 and config.max_positions == 128


def test_version_4_spellings():
    plain = {
        "model_type": "llama",
        **SIZES,
        "rope_theta": 500.0,
        "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"},
    }
    config = read_config(plain, {"eos_token_id": [2, 7, 99]}, "x").model
    assert config.rope_theta == 500.0 and config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 32)
    assert config.eos_token_ids == (2, 7)
    plain |= {"rope_scaling": {"type": "linear", "factor": 2.0}, "bos_token_id": None}
    config = read_config(plain, {}, "x").model
    assert config.rope_scaling == RopeScaling("linear", 2.0) and config.bos_token_id is None
    plain = {"model_type": "mistral", **SIZES, "sliding_window": None, "rope_scaling": None}
    assert read_config(plain, {}, "x").model.sliding_window is None


def test_sharded_bfloat16_folders_with_tokenizer(tmp_path):
    theirs = randomised("Llama", {}, torch.bfloat16)
    theirs.save_pretrained(tmp_path / "m", max_shard_size="8KB")
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 3
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    (tmp_path / "m" / "secret.txt").write_text("stays")
    model = qs.load(tmp_path / "m")
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(model.weights.read(name), tensor) and tensor.dtype == torch.bfloat16
    assert set(model.tokenizer.read()) == {"tokenizer.json", "generation_config.json"}
    first = model.source_sha256
    (tmp_path / "m" / "config.json").write_text((tmp_path / "m" / "config.json").read_text() + "\n")
    assert qs.load(tmp_path / "m").source_sha256 != first


@pytest.fixture
def folder(written, tmp_path):
    """A copy of the llama folder, to be spoilt."""
    import shutil

    return shutil.copytree(written("llama")[1], tmp_path / "spoilt")


def reconfigure(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_sparse_ratio_of_the_official_code_and_per_projection(folder):
    reconfigure(folder, sparse_ratio=0.4)
    config = qs.load(folder).config
    assert config.sparsity == (SparsityRule("*_proj", TopK(0.4)),)
    reconfigure(folder, sparse_ratio={"qkv": 0.5, "o_proj": 0.5, "gate_up": 0.5, "down": 0.8})
    assert len(qs.load(folder).config.sparsity) == 7
    with pytest.raises(QSparseError, match="--override"):
        qs.load(folder, sparsity=parse_sparsity(["0.5"]))
    assert qs.load(folder, sparsity=parse_sparsity(["0.5"]), override=True)
    reconfigure(folder, sparse_ratio=-1)
    assert qs.load(folder).config.sparsity == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "lama"}, "model_type is 'lama'.*did you mean llama"),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_size": -32}, "hidden_size|head_dim"),
        ({"num_hidden_layers": 10**12}, "layers is 1000000000000"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
        ({"num_hidden_layers": 3}, "model.layers.2.*missing"),
        ({"num_hidden_layers": 1}, "model.layers.1.*not part"),
        ({"intermediate_size": 43}, r"gate_proj.weight has the shape \[42, 32\].*\[43, 32\]"),
        ({"intermediate_size": None}, "intermediate_size is missing"),
        ({"num_attention_heads": 0}, "0 heads|heads is 0"),
        ({"num_key_value_heads": 3}, "4 heads cannot share 3"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor is 'None'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "one set of values"),
        ({"rope_parameters": "linear"}, "rope_parameters is 'linear'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"attention_bias": True}, "q_proj.bias.*missing"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"sparse_ratio": 1.5}, "sparse_ratio is '1.5'"),
        ({"sparse_ratio": "half"}, "sparse_ratio"),
        ({"sparse_ratio": {"down": 1.5}}, "sparse_ratio: down: the ratio is 1.5"),
        ({"sparse_ratio": {"dwn": 0.5}}, "did you mean down"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method is 'gptq'"),
        ({"quantization_config": {"quant_method": "bitnet"}}, "weight_scale is missing"),
        ({"quantization_config": {"quant_method": "bitnet", "modules_to_not_convert": []}}, "modules_to_not_convert"),
        ({"quantization_config": {"quant_method": "bitnet", "linear_class": "x"}}, "linear_class"),
    ],
)
def test_configs_that_contradict_the_tensors_or_are_not_understood(folder, changes, message):
    reconfigure(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        qs.load(folder)


def test_mixed_attention_is_refused(written, tmp_path):
    plain = {"model_type": "qwen2", **SIZES, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    with pytest.raises(CheckpointError, match="one kind of attention"):
        read_config(plain, {}, "x")
    assert read_config(plain | {"max_window_layers": 2}, {}, "x").model.sliding_window is None
    assert read_config(plain | {"sliding_window": 128}, {}, "x").model.sliding_window is None


@pytest.mark.parametrize(
    "text", [b"", b"[1]", b"{", b"\xff", b'{"a": ' + b"[" * 100_000, b'{"hidden_size": 1' + b"0" * 9999 + b"}"]
)
def test_config_that_is_no_json_object(folder, text):
    (folder / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        qs.load(folder)


def lie(path, change):
    """Rewrites the header of a safetensors file."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda p: p.write_bytes(b""),
        lambda p: p.write_bytes(p.read_bytes()[:-100]),
        lambda p: p.write_bytes(p.read_bytes()[:1000]),
        lambda p: p.write_bytes(struct.pack("<Q", 1 << 60) + p.read_bytes()[8:]),
        lambda p: p.write_bytes(struct.pack("<Q", 0) + p.read_bytes()[8:]),
        lambda p: p.write_bytes(b"PK\x03\x04" + p.read_bytes()),
        lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
        lambda p: lie(p, lambda h: h[NORM].update(data_offsets=[0, 1 << 40])),
        lambda p: lie(p, lambda h: h[NORM].update(data_offsets=[0, 128])),
        lambda p: lie(p, lambda h: h[NORM].update(shape=[1 << 40])),
        lambda p: lie(p, lambda h: h[NORM].update(shape=[-32])),
        lambda p: lie(p, lambda h: h[NORM].update(dtype="F99")),
    ],
)
def test_damaged_safetensors_name_the_file(folder, spoil):
    spoil(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a whole safetensors file"):
        qs.load(folder)


def test_unsupported_dtypes_and_nan_name_the_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.float8_e4m3fn)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name} is stored as F8_E4M3"):
        qs.load(folder)
    tensors[name][1, 1] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"tensor {name} holds 1 NaN"):
        qs.load(folder).weights.read(name)


def test_buffers_of_old_versions_are_dropped(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}, folder / "model.safetensors")
    assert qs.load(folder).weights.shapes.keys() == tensors.keys()


def index(folder, **weight_map):
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    names = load_file(folder / "part.safetensors")
    text = json.dumps({"weight_map": {name: "part.safetensors" for name in names} | weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def test_an_index_stays_inside_its_folder(folder, tmp_path):
    (tmp_path / "outside.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    index(folder)
    assert qs.load(folder).weights.read(NORM).shape == (32,)
    for name in (
        "../outside.safetensors",
        str(tmp_path / "outside.safetensors"),
        "..",
        "",
        "a/../part.safetensors",
        3,
        None,
        ["x"],
    ):
        (folder / "part.safetensors").rename(folder / "model.safetensors")
        index(folder, **{NORM: name})
        with pytest.raises(CheckpointError, match="leads out of the folder"):
            qs.load(folder)
    (folder / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    (folder / "part.safetensors").rename(folder / "model.safetensors")
    index(folder, **{NORM: "link.safetensors"})
    with pytest.raises(CheckpointError, match="is a link to"):
        qs.load(folder)


def test_missing_shards_wrong_shards_and_no_map(folder):
    index(folder, **{NORM: "gone.safetensors"})
    with pytest.raises(CheckpointError, match=r"gone\.safetensors cannot be opened"):
        qs.load(folder)
    save_file({"x": torch.zeros(1)}, folder / "other.safetensors")
    (folder / "part.safetensors").rename(folder / "model.safetensors")
    index(folder, **{NORM: "other.safetensors"})
    with pytest.raises(CheckpointError, match=r"places model\.norm\.weight in other\.safetensors"):
        qs.load(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="weight_map"):
        qs.load(folder)


def test_tokenizer_files_come_from_inside_the_folder_only(folder, tmp_path):
    (tmp_path / "secret").write_text("{}")
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is a link"):
        qs.load(folder)


def test_the_cache_of_hugging_face_hub_is_understood(folder, tmp_path):
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert qs.load(snapshot).weights.read(NORM).shape == (32,)


def test_folders_without_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pickles.*safe_serialization=True"):
        qs.load(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        qs.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"without config\.json"):
        qs.load(folder)


@settings(max_examples=150, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cut=st.integers(0, 1 << 30),
    flips=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=4),
    file=st.sampled_from(["model.safetensors", "config.json"]),
)
def test_damage_never_raises_anything_else(written, tmp_path, cut, flips, file):
    source, folder = written("llama")[1], tmp_path / "damaged"
    folder.mkdir(exist_ok=True)
    for name in ("model.safetensors", "config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    raw = bytearray((source / file).read_bytes())
    for position, value in flips:
        raw[position % len(raw)] = value
    (folder / file).write_bytes(raw[: cut % (2 * len(raw))])
    try:
        model = qs.load(folder)
        for name in model.weights.shapes:
            model.weights.read(name)
    except QSparseError as error:
        assert str(error)
