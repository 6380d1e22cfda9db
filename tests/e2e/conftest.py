"""The commands as a user runs them, and a tokenizer small enough for tiny models."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

TEXT = "The quick brown fox jumps over the lazy dog. A small machine that could only add two numbers, and a big dream."


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """PyTorch alone has hundreds of small operations here, which more threads on a busy machine only slow down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def process() -> Callable[..., Any]:
    """Runs ``qsparse-NAME ARGUMENTS --json`` in a process of its own, which must succeed; gives what it printed."""

    def run(name: str, *arguments: object) -> Any:
        script = Path(sys.executable).with_name(f"qsparse-{name}")
        words = [str(script), *map(str, arguments), "--json"]
        result = subprocess.run(words, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    return run


@pytest.fixture(scope="session")
def export() -> Callable[..., Any]:
    """``qsparse-export ARGUMENTS --json`` in this process, which has imported torch already; gives the manifest."""
    from qsparse_export.cli.export import main

    def run(*arguments: object) -> Any:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            assert main([*map(str, arguments), "--json"]) == 0
        return json.loads(printed.getvalue())

    return run


@pytest.fixture(scope="session")
def add_tokenizer() -> Callable[[Path], int]:
    """Trains a byte-level BPE tokenizer on one sentence and writes its files into a folder; gives its vocabulary size."""

    def write(folder: Path) -> int:
        from tokenizers import ByteLevelBPETokenizer

        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train_from_iterator([TEXT] * 4, vocab_size=288, special_tokens=["<s>", "</s>"], show_progress=False)
        tokenizer.save(str(folder / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "add_bos_token": False,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return tokenizer.get_vocab_size()

    return write
