"""ir.Model, Target -> files of a bundle: hands over to one runtime and adds what its callers need."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

    from qsparse_export.config import ModelConfig
    from qsparse_export.runtimes.base import Runtime
    from qsparse_export.targets.target import Target


def compile_graph(graph: ir.Model, target: Target, runtime: Runtime, folder: Path, *, native: bool) -> tuple[str, ...]:
    """Writes into ``folder`` what ``runtime`` runs on ``target``; returns the file names. TargetError when it cannot."""
    target.require_runtime(runtime.name)
    return runtime.compile(graph, target, folder, native=native)


def add_decoder_files(
    folder: Path,
    files: tuple[str, ...],
    config: ModelConfig,
    tokenizer: Mapping[str, bytes] | None,
    *,
    shares_cache: bool,
) -> None:
    """Writes genai_config.json for the compiled ``files`` and the tokenizer's files (name -> content).

    ``shares_cache``: the graph takes one buffer as past and present.
    """
    from qsparse_export.runtimes.ort.genai import genai_config

    graph = next(name for name in files if name.endswith(".onnx"))
    library = next((name for name in files if name.endswith((".so", ".dylib", ".dll"))), None)
    plain = genai_config(config.to_dict(), graph, library, shares_cache=shares_cache)
    (folder / "genai_config.json").write_text(json.dumps(plain, indent=2) + "\n", "utf-8")
    tokens = dict(tokenizer or {})
    if "tokenizer.json" in tokens:  # onnxruntime-genai refuses a tokenizer without the second file
        tokens.setdefault("tokenizer_config.json", b'{"tokenizer_class": "PreTrainedTokenizerFast"}\n')
    for name, content in tokens.items():
        (folder / name).write_bytes(content)
