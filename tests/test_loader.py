"""load(): the content decides, errors say what came, nothing is read eagerly."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import qsparse_export as qs
from qsparse_export.checkpoints.expected import expected_shapes
from qsparse_export.checkpoints.model import model_name
from qsparse_export.config import ModelConfig, TopK, topk_of
from qsparse_export.errors import CheckpointError
from qsparse_export.loader import FORMATS, Model
from qsparse_export.sparsity import parse_sparsity
from qsparse_export.weights import StateDict, TernaryWeight

CONFIG = ModelConfig("llama", 32, 16, 20, layers=1, heads=2, kv_heads=1, head_dim=8)


def state(config=CONFIG):
    torch.manual_seed(0)
    return {name: torch.randn(shape) for name, shape in expected_shapes(config).items()}


def test_the_suffix_means_nothing(tmp_path):
    path = qs.save(state(), CONFIG, tmp_path / "m.gguf")
    assert qs.load(path).source_format == "qsparse-pt"
    assert qs.load(str(path)).name == "m"


def test_sparsity_is_laid_over(tmp_path):
    path = qs.save(state(), CONFIG, tmp_path / "m.pt")
    config = qs.load(path, sparsity=parse_sparsity(["0.25", "down=0.5:block=4"])).config
    assert topk_of(config.sparsity, "model.layers.0.mlp.down_proj") == TopK(0.5, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\x80\x04K\x01.", "bare pickle"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ((60).to_bytes(8, "little") + b'{"x":{}}', "single safetensors file"),
        (b"PK\x05\x06" + b"\0" * 18, "without a PyTorch model"),
        (b"PK\x03\x04" + b"\0" * 100, "truncated"),
        (b"\x08\x0a\x12\x07pytorch", "ONNX file without a graph"),
        (b"{}", "no known format"),
    ],
)
def test_unknown_content_is_told_apart(tmp_path, content, message):
    (tmp_path / "m.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        qs.load(tmp_path / "m.pt")


def test_paths_that_are_not_there_or_special(tmp_path):
    (tmp_path / "model.pt").touch()
    with pytest.raises(CheckpointError, match=r"does not exist; did you mean model\.pt"):
        qs.load(tmp_path / "modle.pt")
    with pytest.raises(CheckpointError, match="does not exist"):
        qs.load(tmp_path / "a" / "b")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="neither a file nor a folder"):
        qs.load(tmp_path / "pipe")
    with pytest.raises(CheckpointError):
        qs.load("x\0y")
    with pytest.raises(CheckpointError):
        qs.load("a" * 5000)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"),
        ("a-7b-Q4_K_M.gguf", "a-7b"),
        ("a.f16.gguf", "a"),
        ("my model (2).pt", "my-model-2"),
        ("...pt", "model"),
        ("net.pt2", "net"),
        ("weights", "weights"),
    ],
)
def test_names_are_safe_for_folders(tmp_path, file, name):
    assert model_name(tmp_path / file) == name


def test_models_in_memory_have_a_reproducible_hash():
    first = Model.in_memory("m", CONFIG, StateDict(state()))
    assert first.source_sha256 == Model.in_memory("other", CONFIG, StateDict(state())).source_sha256
    changed = state()
    changed["model.norm.weight"][0] += 1
    assert first.source_sha256 != Model.in_memory("m", CONFIG, StateDict(changed)).source_sha256
    with pytest.raises(CheckpointError, match="missing"):
        Model.in_memory("m", CONFIG, StateDict({}))


def test_the_formats_have_one_line_each():
    assert set(FORMATS) == {"qsparse-pt", "transformers", "gguf", "onnx", "pt2", "shape"}


MEASURE = """
import sys
import qsparse_export as qs
from qsparse_export.weights import TernaryWeight

def anonymous():
    with open("/proc/self/status") as status:
        lines = dict(line.split(":", 1) for line in status)
    return int(lines["RssAnon"].split()[0]) >> 10

import torch, safetensors.torch, gguf.quants
torch.zeros(4).aminmax()
before = anonymous()
model = qs.load(sys.argv[1])
loaded = anonymous() - before
worst = 0
for name in model.weights.shapes:
    tensor = model.weights.read(name)
    worst = max(worst, anonymous() - before)
    del tensor
print(loaded, worst)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's /proc")
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_nothing_is_read_eagerly(tmp_path, kind):
    """96 MiB of weights of which the largest tensor is 32 MiB: loading takes next to nothing, reading one tensor at most."""
    config = ModelConfig("llama", 8192, 1024, 1024, layers=1, heads=8, kv_heads=8, head_dim=128, tied_embeddings=True)
    tensors = {name: torch.zeros(shape) for name, shape in expected_shapes(config).items()}
    write = {
        "pt": lambda path: qs.save(tensors, config, path),
        "safetensors": lambda p: hugging_face_folder(p, config, tensors),
    }
    path = write[kind](tmp_path / "m")
    out = subprocess.run(
        [sys.executable, "-P", "-c", MEASURE, str(path)], capture_output=True, text=True, check=True
    ).stdout
    loaded, worst = map(int, out.split())
    assert loaded < 24 and worst < 24 + 2 * 32
    shutil.rmtree(tmp_path)


def hugging_face_folder(path, config, tensors):
    import json

    from safetensors.torch import save_file

    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    plain = {
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "tie_word_embeddings": True,
    }
    (path / "config.json").write_text(json.dumps(plain))
    return path


def test_reading_does_not_change_the_source(tmp_path):
    path = qs.save(state(), CONFIG, tmp_path / "m.pt")
    before = path.read_bytes()
    weights = qs.load(path).weights
    tensor = weights.read("model.norm.weight")
    assert not isinstance(tensor, TernaryWeight)
    assert np.array_equal(tensor.numpy(), state()["model.norm.weight"].numpy())
    assert path.read_bytes() == before
