"""Hostile and mistaken input at the command line: exit code, one paragraph, nothing left behind."""

import contextlib
import dataclasses
import io
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import qsparse_export as qs
from qsparse_export.cli import export as export_command
from qsparse_export.cli import run as run_command
from qsparse_export.config import ModelConfig, SparsityRule, TopK
from qsparse_export.nn.decoder import Decoder

CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=40,
    layers=1,
    heads=2,
    kv_heads=1,
    head_dim=16,
    max_positions=64,
    sparsity=(SparsityRule("*", TopK(0.5)),),
)


SCRIPT = str(Path(sys.executable).with_name("qsparse-export"))


def command(main, *arguments):
    """The entry point of a console script, called: a process for each would import PyTorch again."""
    printed, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
        try:
            code = main([*map(str, arguments)])
        except SystemExit as end:  # argparse
            code = end.code
    return subprocess.CompletedProcess(arguments, code, printed.getvalue(), said.getvalue())


def export(*arguments):
    return command(export_command.main, *arguments)


def run(*arguments):
    return command(run_command.main, *arguments)


def refused(result, *words, code=1):
    """One paragraph on stderr that holds all ``words``, no traceback, nothing on stdout."""
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    text = " ".join(result.stderr.split())
    for word in words:
        assert word in text, text
    return True


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.pt"
    torch.manual_seed(0)
    qs.save(Decoder(CONFIG), CONFIG, path)
    return path


@pytest.fixture(scope="module")
def bundle(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("bundle") / "tiny"
    result = export(checkpoint, "-o", out, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["parity"]["paths"][0]["greedy_agreement"] == 1.0
    return out


@pytest.fixture
def folder(tmp_path):
    """A transformers folder of the tiny model, to be spoilt."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    path = tmp_path / "folder"
    path.mkdir()
    save_file({name: t.contiguous() for name, t in Decoder(CONFIG).state_dict().items()}, path / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "sparse_ratio": 0.5,
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def reconfigure(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def nothing_left(out):
    assert not out.exists()
    assert not list(out.parent.glob(".*.partial"))


def test_pickled_module_names_the_class_and_runs_nothing(tmp_path):
    marker = tmp_path / "executed"

    class Bomb:
        def __reduce__(self):
            return (os.system, (f"touch {marker}",))

    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    torch.save({"state_dict": Bomb()}, tmp_path / "bomb.pt")
    refused(
        export(tmp_path / "module.pt", "-o", tmp_path / "out"), "torch.nn.modules.linear.Linear", "qsparse_export.save"
    )
    refused(export(tmp_path / "bomb.pt", "-o", tmp_path / "out"), "system")
    assert not marker.exists()
    nothing_left(tmp_path / "out")


def test_torchscript_is_refused_with_what_to_do(tmp_path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), str(tmp_path / "script.pt"))
    refused(export(tmp_path / "script.pt", "-o", tmp_path / "out"), "TorchScript")


def test_truncated_zip(tmp_path, checkpoint):
    (tmp_path / "cut.pt").write_bytes(checkpoint.read_bytes()[:-700])
    refused(export(tmp_path / "cut.pt", "-o", tmp_path / "out"), "cut.pt")
    nothing_left(tmp_path / "out")


def test_safetensors_with_a_lying_header(tmp_path, folder):
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(struct.pack("<Q", 1 << 60) + raw[8:])
    refused(export(folder, "-o", tmp_path / "out"), "model.safetensors")
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    name = next(key for key in header if key != "__metadata__")
    header[name]["data_offsets"] = [0, 1 << 40]
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    refused(export(folder, "-o", tmp_path / "out"), "model.safetensors")
    nothing_left(tmp_path / "out")


def test_config_that_contradicts_the_tensors(tmp_path, folder):
    result = export(reconfigure(folder, intermediate_size=41), "-o", tmp_path / "out")
    refused(result, "mlp", "41", "40")


def test_unknown_architecture(tmp_path, folder):
    refused(export(reconfigure(folder, model_type="mamba"), "-o", tmp_path / "out"), "mamba", "llama")


def test_k_out_of_range(tmp_path, folder):
    refused(export(reconfigure(folder, sparse_ratio=1.5), "-o", tmp_path / "out"), "1.5")
    refused(export(reconfigure(folder, sparse_ratio=0.5), "--sparse-ratio", "2", "--override"), "2", code=2)


def test_contradicting_the_checkpoint_needs_override(tmp_path, checkpoint):
    refused(export(checkpoint, "--sparse-ratio", "0.1", "-o", tmp_path / "out"), "--override", code=2)
    result = export(
        checkpoint, "--sparse-ratio", "0.1", "--override", "--verify", "quick", "-o", tmp_path / "out", "--json"
    )
    assert json.loads(result.stdout)["sparsity"][0]["sparse_ratio"] == 0.1


def test_nan_weights_name_the_tensor(tmp_path):
    module = Decoder(CONFIG)
    with torch.no_grad():
        module.model.layers[0].mlp.up_proj.weight[3, 4] = float("nan")
    qs.save(module, CONFIG, tmp_path / "nan.pt")
    refused(export(tmp_path / "nan.pt", "-o", tmp_path / "out"), "model.layers.0.mlp.up_proj.weight", "NaN")
    nothing_left(tmp_path / "out")


def test_missing_path_and_folder_without_weights(tmp_path):
    refused(export(tmp_path / "none.pt"), "none.pt")
    (tmp_path / "empty").mkdir()
    refused(export(tmp_path / "empty"), "config.json")


def test_pt2_needs_trust(tmp_path):
    program = torch.export.export(torch.nn.Linear(3, 4), (torch.zeros(2, 3),))
    torch.export.save(program, tmp_path / "m.pt2")
    refused(export(tmp_path / "m.pt2", "-o", tmp_path / "out"), "--trust")
    nothing_left(tmp_path / "out")
    result = export(tmp_path / "m.pt2", "-o", tmp_path / "out", "--trust", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["kind"] == "module"


def test_occupied_output_folder(tmp_path, checkpoint):
    (tmp_path / "mine.txt").write_text("mine")
    refused(export(checkpoint, "-o", tmp_path), "not empty")
    refused(export(checkpoint, "-o", tmp_path, "--force"), "not empty")
    assert (tmp_path / "mine.txt").read_text() == "mine"


@contextlib.contextmanager
def small_disk(path):
    """A file system that is nearly full where root can mount one, else a limit on the size of a file."""
    path.mkdir()
    if os.geteuid() == 0 and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", path]).returncode == 0:
        try:
            yield None
        finally:
            subprocess.run(["umount", path], check=True)
    else:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384))


def test_full_disk(tmp_path, checkpoint):
    with small_disk(tmp_path / "disk") as limit:
        words = [SCRIPT, checkpoint, "-o", tmp_path / "disk" / "out"]
        result = subprocess.run(words, capture_output=True, text=True, timeout=300, preexec_fn=limit, check=False)
        refused(result, "cannot write", "space")
        assert list((tmp_path / "disk").iterdir()) == []


def test_killed_in_the_middle(tmp_path, checkpoint):
    out = tmp_path / "out"
    process = subprocess.Popen([SCRIPT, str(checkpoint), "-o", str(out)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".*.partial")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    assert export(checkpoint, "-o", out, "--verify", "quick").returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_terminated_in_the_middle_cleans_up(tmp_path, checkpoint):
    out = tmp_path / "out"
    process = subprocess.Popen([SCRIPT, str(checkpoint), "-o", str(out)], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".*.partial")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_wrong_target_name_offers_near_ones(checkpoint):
    refused(export(checkpoint, "--target", "x86-64-v33"), "x86-64-v3")
    refused(export(checkpoint, "--runtime", "orts"), "ort", code=2)
    refused(export(checkpoint, "--passes", "fold-constant"), "fold-constants", code=2)


def test_usage_errors_exit_with_2(checkpoint):
    for arguments in (["list"], ["list", "things"], [], [checkpoint, "--verify", "maybe"], [checkpoint, "targets"]):
        assert export(*arguments).returncode == 2
    assert run().returncode == 2


def test_flipped_byte(tmp_path, bundle):
    spoilt = tmp_path / "spoilt"
    shutil.copytree(bundle, spoilt)
    raw = bytearray((spoilt / "model.onnx.data").read_bytes())
    raw[len(raw) // 2] ^= 1
    (spoilt / "model.onnx.data").write_bytes(raw)
    refused(run(spoilt, "--ids", "1"), "checksum", "model.onnx.data")


def test_bundle_for_another_cpu(tmp_path, bundle):
    foreign = tmp_path / "foreign"
    shutil.copytree(bundle, foreign)
    manifest = json.loads((foreign / "manifest.json").read_text())
    manifest["target"] |= {"name": "giant", "features": ["amx_int8_of_tomorrow"]}
    (foreign / "manifest.json").write_text(json.dumps(manifest))
    refused(run(foreign, "--ids", "1"), "giant", "amx_int8_of_tomorrow", "--no-native")
    result = run(foreign, "--ids", "1", "-n", "2", "--no-native", "--json")
    assert result.returncode == 0 and len(json.loads(result.stdout)["tokens"]) == 2


def test_run_refuses_what_is_no_bundle_and_wrong_prompts(tmp_path, bundle):
    refused(run(tmp_path), "no bundle")
    refused(run(bundle, "--prompt", "x"), "tokenizer")
    refused(run(bundle, "--ids", "one"), "--ids", code=2)
    refused(run(bundle, "--ids", "999"), "64", code=2)


def test_run_prints_the_promised_json(bundle):
    result = run(bundle, "--ids", "1,2,3", "-n", "4", "--json")
    plain = json.loads(result.stdout)
    assert set(plain) == {
        "text",
        "tokens",
        "prompt_tokens",
        "native_calls",
        "prefill_tokens_per_s",
        "decode_tokens_per_s",
    }
    assert plain["prompt_tokens"] == [1, 2, 3] and len(plain["tokens"]) == 4
    assert sum(plain["native_calls"]["SparseMatMul"].values()) == 4 * 4


def test_lists_print_what_there_is():
    assert {"cpu", "x86-64-v3"} <= json.loads(export("list", "targets", "--json").stdout).keys()
    assert "gguf" in export("list", "formats").stdout.lower()
    assert "fold-constants" in export("list", "passes").stdout


def test_default_output_is_name_and_target_beside_the_caller(tmp_path, checkpoint, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = export(checkpoint, "--verify", "none")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "tiny-cpu" / "manifest.json").is_file()
    assert "not verified" in result.stderr


def test_shapes_stand_in_for_checkpoints(tmp_path):
    first = export("shape:qsparse-300m,layers=1", "--seed", "3", "--verify", "none", "-o", tmp_path / "a", "--json")
    assert first.returncode == 0, first.stderr
    refused(export("shape:qsparse-301m"), "qsparse-300m", code=2)


def test_dataclass_config_is_not_unpickled(tmp_path):
    torch.save({"format": "qsparse-export", "version": 1, "config": CONFIG, "state_dict": {}}, tmp_path / "c.pt")
    refused(export(tmp_path / "c.pt"), "ModelConfig")
    assert dataclasses.is_dataclass(CONFIG) and Path(tmp_path / "c.pt").exists()
