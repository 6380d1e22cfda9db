"""Checkpoint -> Model: the content decides which reader it goes to, never the suffix.

Nothing is read but headers; tensors come one at a time from ``Model.weights``. See docs/checkpoints.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from qsparse_export.checkpoints.expected import block_linears
from qsparse_export.checkpoints.exported_program import read_exported_program
from qsparse_export.checkpoints.gguf_model import read_gguf
from qsparse_export.checkpoints.model import Model, Program
from qsparse_export.checkpoints.onnx_file import looks_like_onnx, read_onnx
from qsparse_export.checkpoints.qsparse_pt import read_qsparse_pt, save
from qsparse_export.checkpoints.shapes import PREFIX, read_shape
from qsparse_export.checkpoints.transformers_folder import read_transformers_folder
from qsparse_export.checkpoints.zip_files import archive_kind
from qsparse_export.config import SparsityRule
from qsparse_export.errors import CheckpointError, UsageError, near_names
from qsparse_export.sparsity import with_sparsity

__all__ = ["FORMATS", "Model", "Program", "load", "save"]

FORMATS = {
    "qsparse-pt": "a .pt file of format, version, config and state_dict, written by qsparse_export.save",
    "transformers": "a folder with config.json and safetensors: Llama, Mistral, Qwen2, BitNet",
    "gguf": "a GGUF file of the llama or qwen2 architecture",
    "onnx": "a model.onnx of another exporter, opset 17 to 25",
    "pt2": "an exported program of torch.export.save; needs --trust",
    "shape": "shape:NAME[,layers=N]: a published shape with random weights",
}
_EXPECTED = "expected " + "; ".join(FORMATS.values())


def load(
    path: str | Path,
    *,
    sparsity: Sequence[SparsityRule] | None = None,
    override: bool = False,
    trust: bool = False,
    seed: int = 0,
) -> Model:
    """The model at ``path``, or the one that ``shape:NAME`` stands for.

    ``sparsity`` is laid over the checkpoint's own rules (``qsparse_export.sparsity.parse_sparsity`` makes it from text);
    contradicting a checkpoint that was trained sparse needs ``override``. ``trust`` allows formats whose loading can run
    code (.pt2). ``seed`` is for ``shape:`` only. Raises CheckpointError when the input is damaged, unsafe, incomplete,
    contradictory or unknown, and UsageError for a bad ``shape:`` or sparsity.
    """
    model = _read(path, trust=trust, seed=seed)
    if model.config is None:
        if sparsity:
            raise UsageError(
                f"{path} is an exported graph, which cannot be sparsified any more: call "
                "qsparse_export.sparsify on the module before it is exported, and leave --sparse-ratio out"
            )
        return model
    config = with_sparsity(model.config, sparsity, block_linears(model.config), override=override)
    return replace(model, config=config)


def _read(path: str | Path, *, trust: bool, seed: int) -> Model:
    if str(path).startswith(PREFIX):
        return read_shape(str(path), seed)
    path = Path(path)
    try:
        if path.is_dir():
            return read_transformers_folder(path)
        if not path.is_file():
            raise CheckpointError(_not_there(path))
        with path.open("rb") as file:
            start = file.read(64)
        if start.startswith(b"GGUF"):
            return read_gguf(path)
        if start.startswith(b"PK"):
            return _read_archive(path, trust=trust)
        if looks_like_onnx(start):
            return read_onnx(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    raise CheckpointError(f"{path} {_what_else(start)}")


def _read_archive(path: Path, *, trust: bool) -> Model:
    kind = archive_kind(path)
    if kind == "pt2":
        return read_exported_program(path, trust=trust)
    if kind == "torch-save":
        return read_qsparse_pt(path)
    if kind == "torchscript":
        raise CheckpointError(
            f"{path} is a TorchScript archive, which holds compiled code and not a model that can be exported; expected the "
            "weights: in the program that has the model, call qsparse_export.save(model, config, path)"
        )
    raise CheckpointError(f"{path} is a zip archive without a PyTorch model in it; {_EXPECTED}")


def _not_there(path: Path) -> str:
    if path.exists():
        return f"{path} is neither a file nor a folder; {_EXPECTED}"
    try:
        siblings = [sibling.name for sibling in path.parent.iterdir()][:1000]
    except OSError:
        siblings = []
    near = near_names(path.name, siblings) if siblings else ""
    hint = f"; {near}" if near.startswith("did you mean") else ""
    return f"{path} does not exist{hint}; {_EXPECTED}"


def _what_else(start: bytes) -> str:
    """Names what a file is, by its first bytes, that no reader takes, and what to do about it."""
    if not start:
        return "is empty: copy or download it again"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the data: run 'git lfs pull' beside it"
    if start[0] == 0x80 and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return (
            "is a bare pickle (or a torch.save file from before PyTorch 1.6), and loading it could run any code; expected "
            "tensors only: in the program that has the model, call qsparse_export.save(model, config, path)"
        )
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 40:
        return (
            "is a single safetensors file, which says nothing of the model's shape; name the folder that holds it as "
            "model.safetensors beside its config.json"
        )
    return f"is in no known format (it begins with {start[:8]!r}); {_EXPECTED}"
