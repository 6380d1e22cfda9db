"""Our own .pt: save and load are inverse, and nothing but plain tensors is ever decoded."""

import io
import os
import resource
import zipfile
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qsparse_export as qs
from qsparse_export.checkpoints.expected import expected_shapes
from qsparse_export.config import ModelConfig, MoE, RopeScaling, SparsityRule, TopK
from qsparse_export.errors import CheckpointError, QSparseError
from qsparse_export.tokenizer import TokenizerFiles

CONFIG = ModelConfig("llama", 32, 16, 20, layers=1, heads=2, kv_heads=1, head_dim=8)


def state(config, dtype=torch.float32):
    torch.manual_seed(0)
    return {name: torch.randn(shape).to(dtype) for name, shape in expected_shapes(config).items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return qs.save(state(CONFIG), CONFIG, tmp_path_factory.mktemp("saved") / "tiny.pt")


configs = st.builds(
    ModelConfig,
    architecture=st.sampled_from(["llama", "mistral", "qwen2", "bitnet"]),
    vocab_size=st.integers(8, 20),
    hidden_size=st.integers(1, 20),
    intermediate_size=st.integers(1, 20),
    layers=st.integers(1, 3),
    heads=st.just(4),
    kv_heads=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([2, 6]),
    activation=st.sampled_from(["silu", "relu2"]),
    rope_scaling=st.sampled_from([None, RopeScaling("linear", 2.0), RopeScaling("llama3", 8.0, 1.0, 4.0, 128)]),
    sliding_window=st.sampled_from([None, 5]),
    qkv_bias=st.booleans(),
    o_bias=st.booleans(),
    mlp_bias=st.booleans(),
    sub_norms=st.booleans(),
    linear_norm=st.booleans(),
    tied_embeddings=st.booleans(),
    quantization=st.sampled_from(["none", "bitnet"]),
    sparsity=st.sampled_from([(), (SparsityRule("*_proj", TopK(0.4, 4, "l2")), SparsityRule("*.q_proj", TopK(0.0)))]),
    moe=st.sampled_from([None, MoE(3, 2)]),
    bos_token_id=st.sampled_from([None, 1]),
    eos_token_ids=st.sampled_from([(), (2,), (2, 3)]),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=configs, dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_load_inverts_save(tmp_path, config, dtype):
    tensors = state(config, dtype)
    model = qs.load(qs.save(tensors, config, tmp_path / "m.pt"))
    assert model.config == config and model.source_format == "qsparse-pt" and model.name == "m"
    assert model.weights.shapes == expected_shapes(config)
    for name, tensor in tensors.items():
        read = model.weights.read(name)
        assert read.dtype == dtype and torch.equal(read, tensor)


def test_tied_heads_transposed_views_and_tokenizers_travel(tmp_path):
    config = replace(CONFIG, tied_embeddings=True)
    tensors = state(config)
    view = torch.randn(16, 20).T[:, :]
    tensors["model.layers.0.mlp.up_proj.weight"] = view
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tokenizer = TokenizerFiles({"tokenizer.json": b"{}", "tokenizer.model": bytes(range(256))})
    model = qs.load(qs.save(tensors, config, tmp_path / "m.pt", tokenizer))
    assert "lm_head.weight" not in model.weights.shapes
    assert torch.equal(model.weights.read("model.layers.0.mlp.up_proj.weight"), view)
    assert model.tokenizer.read() == tokenizer.read()


def test_the_file_is_small_and_its_hash_is_the_files(saved):
    import hashlib

    assert qs.load(saved).source_sha256 == hashlib.sha256(saved.read_bytes()).hexdigest()
    data = sum(4 * torch.Size(shape).numel() for shape in expected_shapes(CONFIG).values())
    assert saved.stat().st_size < data + 16384


def test_saving_is_atomic(tmp_path, monkeypatch):
    path = qs.save(state(CONFIG), CONFIG, tmp_path / "m.pt")
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        qs.save(state(CONFIG, torch.float16), CONFIG, path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["m.pt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "extra is not part"),
        (lambda t: t.update({"lm_head.weight": torch.zeros(3, 3)}), "lm_head.weight has the shape"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(16, dtype=torch.int64)}),
            "model.norm.weight is torch.int64",
        ),
        (lambda t: t.update({"model.norm.weight": torch.zeros(16, device="meta")}), "model.norm.weight is sparse"),
    ],
)
def test_what_does_not_fit_the_config_is_not_saved(tmp_path, change, message):
    tensors = state(CONFIG)
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        qs.save(tensors, CONFIG, tmp_path / "m.pt")
    assert not list(tmp_path.iterdir())


def test_nan_is_found_when_the_tensor_is_read(tmp_path):
    tensors = state(CONFIG)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = float("nan")
    tensors["model.norm.weight"][0] = float("-inf")
    model = qs.load(qs.save(tensors, CONFIG, tmp_path / "m.pt"))
    for name in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        with pytest.raises(CheckpointError, match=f"tensor {name} holds 1 NaN or Inf"):
            model.weights.read(name)


def content(**changes):
    made = {"format": "qsparse-export", "version": 1, "config": CONFIG.to_dict(), "state_dict": state(CONFIG)} | changes
    return {key: value for key, value in made.items() if value is not None}


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (content(format="other"), "expected format 'qsparse-export'"),
        (content(version=2), "version 2"),
        (content(state_dict=None), "expected format, version, config"),
        (content(optimizer={}), "optimizer"),
        (content(config=CONFIG), "qsparse_export.config.ModelConfig"),
        (content(config={"layers": 3}), "config does not describe a model"),
        (content(config=CONFIG.to_dict() | {"layers": 10**12}), "layers is 1000000000000"),
        (content(config=CONFIG.to_dict() | {"layers": -1}), "layers is -1"),
        (content(config=CONFIG.to_dict() | {"layers": "two"}), "layers is 'two'"),
        (content(config=CONFIG.to_dict() | {"norm_eps": "small"}), "norm_eps is 'small'"),
        (content(config=CONFIG.to_dict() | {"norm_eps": float("nan")}), "norm_eps is nan"),
        (content(config=CONFIG.to_dict() | {"architecture": "mamba"}), "architecture is 'mamba'"),
        (content(config=CONFIG.to_dict() | {"eos_token_ids": [99]}), "token id is 99"),
        (
            content(
                config=CONFIG.to_dict()
                | {"sparsity": [{"pattern": "*", "sparse_ratio": 1.5, "block": 0, "rescale": "none"}]}
            ),
            "sparse_ratio is 1.5",
        ),
        (content(state_dict={}), "more are missing"),
        (content(state_dict=state(CONFIG) | {"x": torch.zeros(1)}), "x is not part"),
        (content(state_dict=state(CONFIG) | {"model.norm.weight": torch.zeros(9)}), "model.norm.weight has the shape"),
        (content(state_dict=state(CONFIG) | {"model.norm.weight": 3}), "model.norm.weight"),
        (content(tokenizer={"../x": torch.zeros(1, dtype=torch.uint8)}), "x"),
        (state(CONFIG), "bare state dict of 12 tensors"),
        ([1, 2], "holds no dict"),
        (torch.zeros(3), "holds no dict"),
    ],
)
def test_other_contents_are_refused_by_name(tmp_path, made, message):
    torch.save(made, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=message):
        qs.load(tmp_path / "m.pt")


def test_pickled_modules_are_named_and_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    class Hungry:
        def __reduce__(self):
            return (bytearray, (10**12,))  # weights_only would allow it

    for made, name in ((torch.nn.Linear(2, 2), "Linear"), (Bomb(), "mkdir"), (Hungry(), "bytearray")):
        torch.save({"x": made}, tmp_path / "m.pt")
        with pytest.raises(CheckpointError, match=name):
            qs.load(tmp_path / "m.pt")
        torch.save({"x": made}, tmp_path / "m.pt", pickle_protocol=4)
        with pytest.raises(CheckpointError, match=r"m\.pt"):
            qs.load(tmp_path / "m.pt")
    assert not (tmp_path / "executed").exists()


def test_old_pickles_torchscript_and_compressed_archives_are_refused(tmp_path):
    torch.save(state(CONFIG), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="bare pickle"):
        qs.load(tmp_path / "old.pt")
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), str(tmp_path / "script.pt"))
    with pytest.raises(CheckpointError, match="TorchScript"):
        qs.load(tmp_path / "script.pt")
    with zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"0" * 100000)
    with pytest.raises(CheckpointError, match="compressed"):
        qs.load(tmp_path / "packed.pt")


def attempt(path, raw):
    """Loads and reads all of it; only a QSparseError may come out."""
    path.write_bytes(raw)
    try:
        model = qs.load(path)
        for name in model.weights.shapes:
            model.weights.read(name)
    except QSparseError as error:
        assert str(error)


def with_pickle(saved, pickle):
    """The archive with another data.pkl, its checksum right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as target:
        for name in source.namelist():
            target.writestr(name, pickle if name.endswith("data.pkl") else source.read(name))
    return buffer.getvalue()


flips = st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(0, 255)), max_size=4)


@settings(max_examples=150, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 1 << 30), changed=flips, inside=st.booleans())
def test_damage_never_raises_anything_else(saved, tmp_path, cut, changed, inside):
    if inside:
        with zipfile.ZipFile(saved) as archive:
            raw = bytearray(archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl"))))
    else:
        raw = bytearray(saved.read_bytes())
    for position, value in changed:
        raw[position % len(raw)] = value
    attempt(tmp_path / "m.pt", with_pickle(saved, bytes(raw)) if inside else bytes(raw[: cut % (2 * len(raw))]))


def test_tensors_that_claim_a_terabyte_take_no_memory(saved, tmp_path):
    with zipfile.ZipFile(saved) as archive:
        pickle = archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = pickle.index(b"K\x20K\x10")  # [32, 16]
    huge = b"\x8a\x06" + (1 << 40).to_bytes(6, "little")
    for claimed in (huge + pickle[size + 2 :], huge + huge + pickle[size + 4 :]):
        attempt(tmp_path / "m.pt", with_pickle(saved, pickle[:size] + claimed))
        with pytest.raises(CheckpointError):
            qs.load(tmp_path / "m.pt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + (64 << 10)
