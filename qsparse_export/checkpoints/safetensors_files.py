"""Tensors in safetensors files, memory-mapped: headers are checked at once, data is read tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from qsparse_export.checkpoints.folder import has_member, member, read_json
from qsparse_export.errors import CheckpointError

if TYPE_CHECKING:
    import torch

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOAT_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as stored: its shape, its safetensors dtype name, and the open file that holds it."""

    shape: tuple[int, ...]
    dtype: str
    file: Any

    def read(self, name: str) -> torch.Tensor:
        """The tensor, a view of the memory-mapped file."""
        from safetensors import SafetensorError

        try:
            tensor: torch.Tensor = self.file.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"tensor {name} cannot be read: {error}; the file is damaged: copy it again"
            ) from error
        return tensor


def open_folder(folder: Path) -> tuple[dict[str, StoredTensor], tuple[Path, ...]]:
    """Every tensor of the folder's weights by its stored name, and the files that hold them.

    ``model.safetensors`` wins over an index of shards, as in transformers. Raises CheckpointError for missing, pickled
    or damaged weights, and for an index that names files outside the folder or tensors that its files lack.
    """
    if has_member(folder, SINGLE_FILE):
        path = member(folder, SINGLE_FILE)
        return open_file(path), (path,)
    if has_member(folder, INDEX_FILE):
        return _open_shards(folder)
    _refuse_without_weights(folder)


def _open_shards(folder: Path) -> tuple[dict[str, StoredTensor], tuple[Path, ...]]:
    weight_map = read_json(folder, INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder}: {INDEX_FILE} has no weight_map; expected tensor names and their files")
    paths: dict[str, Path] = {}
    for name in weight_map.values():
        if not isinstance(name, str) or name not in paths:
            path = member(folder, name)
            paths[path.name] = path
    shards = {name: open_file(path) for name, path in paths.items()}
    tensors = {}
    for tensor, name in weight_map.items():
        if tensor not in shards[name]:
            raise CheckpointError(
                f"{folder}: {INDEX_FILE} places {tensor} in {name}, which does not hold it: the shards are of "
                "different downloads; download the whole folder again"
            )
        tensors[tensor] = shards[name][tensor]
    return tensors, tuple(paths.values())


def open_file(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of one file. Raises CheckpointError when the header is damaged or promises data that is not there."""
    from safetensors import SafetensorError, safe_open

    try:
        # The library checks that the header fits the file and that the tensors tile its data without gap or overlap.
        file = safe_open(path, framework="pt", device="cpu")
        tensors = {}
        for name in file.keys():  # noqa: SIM118 - not a dict
            part = file.get_slice(name)
            tensors[name] = StoredTensor(tuple(part.get_shape()), part.get_dtype(), file)
        return tensors
    except (SafetensorError, OSError, RuntimeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}); {_advice(path)}") from error


def _advice(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        return "it is empty: copy or download it again"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the data: run 'git lfs pull' in the folder"
    if start.startswith((b"PK", b"\x80")):
        return "it is a pickle under a safetensors name: save the model again with safe_serialization=True"
    return "it is truncated or its header is damaged: copy or download it again"


def _refuse_without_weights(folder: Path) -> NoReturn:
    names = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in names if name.endswith((".bin", ".pth", ".pt", ".ckpt", ".index.json"))]
    others = [name for name in names if name.endswith((".safetensors", ".gguf"))]
    if others:
        raise CheckpointError(
            f"{folder} has no {SINGLE_FILE} and no {INDEX_FILE}, but {', '.join(others[:3])}: name a GGUF file itself, "
            f"or rename the one safetensors file to {SINGLE_FILE}"
        )
    if pickles:
        raise CheckpointError(
            f"{folder} holds its weights as pickles ({', '.join(pickles[:3])}), which can run code when they are loaded; "
            "expected safetensors: convert with transformers' AutoModelForCausalLM.from_pretrained(...)"
            ".save_pretrained(..., safe_serialization=True), or name a .pt file written by qsparse_export.save"
        )
    raise CheckpointError(
        f"{folder} has a configuration but no weights; expected {SINGLE_FILE} or {INDEX_FILE} with its shards: "
        "download the whole folder"
    )


def require_float(tensors: Mapping[str, StoredTensor], source: str) -> None:
    """Raises CheckpointError naming the first tensor that is not float32, float16 or bfloat16."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{source}: {name} is stored as {tensor.dtype}; expected {', '.join(FLOAT_DTYPES)} (or packed BitNet "
                "weights with a quantization_config): convert the checkpoint to one of them"
            )
