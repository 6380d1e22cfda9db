"""qsparse-bench as a user runs it: machine output alone on stdout, one paragraph of error, nothing left when interrupted."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from process_tree import children, kill_if_alive

import qsparse_export as qs
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
    max_positions=4096,
    sparsity=(SparsityRule("*", TopK(0.5)),),
)
COMMAND = str(Path(sys.executable).with_name("qsparse-bench"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    torch.manual_seed(0)
    return qs.export(Decoder(CONFIG), out=tmp_path_factory.mktemp("bundle") / "tiny", verify="none").path


def bench(*arguments, **options):
    return subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=300, **options)


def test_stdout_holds_the_document_alone(bundle, tmp_path):
    # Run where a module would hide Python's own: no process may import it.
    (tmp_path / "json.py").write_text("raise SystemExit('imported from the working directory')")
    result = bench(bundle, "-p", "4", "-n", "2", "-r", "1", "-o", "json", "--dense", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert [row["test"] for row in json.loads(result.stdout)["rows"]] == ["pp4", "pp4", "tg2", "tg2"]
    assert "measuring" in result.stderr


def test_exit_codes(bundle, tmp_path):
    for code, words, arguments in (
        (1, "is no bundle", [tmp_path]),
        (2, "-p 5000: the model has 4096 positions", [bundle, "-p", "5000"]),
        (2, "unrecognized arguments: --fast", [bundle, "--fast"]),
        (2, "the following arguments are required: BUNDLE", []),
    ):
        result = bench(*arguments)
        assert result.returncode == code and result.stdout == "", result.stderr
        assert words in " ".join(result.stderr.split()) and "Traceback" not in result.stderr


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_in_the_middle_leaves_no_process_and_no_file(bundle, tmp_path, how):
    arguments = [COMMAND, str(bundle), "-p", "0", "-n", "256", "-r", "100000", "--dense"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen(arguments, env=environment, start_new_session=True, **pipes)
    deadline = time.monotonic() + 120
    while len(started := children(process.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(started) == 2 and list(tmp_path.glob("qsparse-bench-*"))
    # What a terminal's Ctrl-C reaches is the command alone: a child may still import, and would say where it was stopped.
    assert all(os.getpgid(pid) != process.pid for pid in started)
    os.killpg(process.pid, how)
    try:
        out, errors = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        for pid in [process.pid, *started]:
            kill_if_alive(pid)
        raise
    assert process.returncode == 130 and out == b"" and b"Traceback" not in errors
    while (left := [pid for pid in started if Path(f"/proc/{pid}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.05)  # until their parent's parent has noticed
    assert not left
    assert list(tmp_path.glob("qsparse-bench-*")) == []


def test_killed_in_the_middle_ends_what_it_started(bundle):
    arguments = [COMMAND, str(bundle), "-p", "0", "-n", "256", "-r", "100000"]
    process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (started := children(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    (child,) = started
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()
