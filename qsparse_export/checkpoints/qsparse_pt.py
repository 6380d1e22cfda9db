"""Our own checkpoint: one ``torch.save`` file of plain values and tensors, see docs/checkpoints.md.

``{"format": "qsparse-export", "version": 1, "config": ModelConfig.to_dict(), "state_dict": {name: tensor},
"tokenizer": {file name: uint8 tensor of its bytes}}``; ``tokenizer`` may be absent. Only dicts, lists, text, numbers
and tensors occur: the pickle inside is looked through before it is decoded, and decoded with ``weights_only``.
"""

from __future__ import annotations

import os
import pickletools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsparse_export.checkpoints.expected import check_config, check_tensors, expected_shapes
from qsparse_export.checkpoints.model import Model, model_name
from qsparse_export.checkpoints.zip_files import read_pickle
from qsparse_export.config import ModelConfig
from qsparse_export.errors import CheckpointError
from qsparse_export.tokenizer import MOST_FILE_BYTES, TOKENIZER_FILES, TokenizerFiles
from qsparse_export.weights import StateDict

if TYPE_CHECKING:
    import torch

FORMAT = "qsparse-export"
VERSION = 1
_KEYS = ("format", "version", "config", "state_dict", "tokenizer")
_MOST_PICKLE_BYTES = 64 << 20
_PICKLE_PROTOCOL = 2
_TIED_HEAD = "lm_head.weight"
# All that torch.save writes for dicts of tensors. weights_only allows more, such as bytearray(10**12).
_ALLOWED_GLOBALS = frozenset(
    {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"}
    | {
        f"torch {kind}Storage"
        for kind in ("Float", "Half", "BFloat16", "Double", "Byte", "Char", "Int", "Long", "Bool")
    }
)


def save(
    model: torch.nn.Module | Mapping[str, torch.Tensor],
    config: ModelConfig,
    path: str | Path,
    tokenizer: TokenizerFiles | None = None,
) -> Path:
    """Writes a checkpoint that :func:`qsparse_export.load` reads, atomically, and returns its path.

    ``model`` is a decoder or its ``state_dict()``: floating-point tensors by Hugging Face names, linears [N, K]. With
    ``config.tied_embeddings`` a ``lm_head.weight`` is left out. Raises CheckpointError, and writes nothing, when the
    tensors are not those that ``config`` implies. NaN and Inf are saved, and refused when the model is exported.
    """
    import torch

    path = Path(path)
    state = dict(model.state_dict() if isinstance(model, torch.nn.Module) else model)
    if config.tied_embeddings:
        state.pop(_TIED_HEAD, None)
    check_config(config, "the config to save")
    check_tensors({name: tuple(tensor.shape) for name, tensor in state.items()}, config, "the model to save")
    for name, tensor in state.items():
        _require_plain(name, tensor, "the model to save")
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "config": config.to_dict(),
        "state_dict": {name: _own_storage(state[name]) for name in expected_shapes(config)},
    }
    if tokenizer is not None:
        content["tokenizer"] = {
            name: torch.frombuffer(bytearray(text), dtype=torch.uint8)
            for name, text in sorted(tokenizer.read().items())
            if text
        }
    _write_atomically(content, path)
    return path


def _own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with a storage of just its own data: torch.save writes the whole storage of a view."""
    tensor = tensor.detach().cpu().contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()


def _write_atomically(content: dict[str, Any], path: Path) -> None:
    import torch

    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_qsparse_pt(path: Path) -> Model:
    """Raises CheckpointError for anything but our own format: pickled classes, bare state dicts, other versions."""
    refuse_pickled_classes(path)
    content = _load_tensors(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(_not_ours(path, content))
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has version {content.get('version')!r} of the format; this release reads {VERSION}: "
            "use the release of qsparse-export that wrote it, or a newer one"
        )
    unknown = [str(key) for key in content if key not in _KEYS]
    plain, state = content.get("config"), content.get("state_dict")
    if unknown or not isinstance(plain, dict) or not isinstance(state, dict):
        raise CheckpointError(
            f"{path} has the keys {', '.join(map(str, content))}; expected {', '.join(_KEYS)}, with dicts under config and "
            "state_dict: write it with qsparse_export.save"
        )
    config = ModelConfig.from_dict(plain)
    check_config(config, str(path))
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        _require_plain(name, tensor, str(path))
        tensors[name] = tensor.detach()
    if config.tied_embeddings:
        tensors.pop(_TIED_HEAD, None)
    weights = StateDict(tensors)
    check_tensors(weights.shapes, config, str(path))
    return Model(
        name=model_name(path),
        config=config,
        weights=weights,
        tokenizer=_tokenizer(content.get("tokenizer"), path),
        source_format="qsparse-pt",
        source=(path,),
    )


def refuse_pickled_classes(path: Path) -> None:
    """Raises CheckpointError naming every class or function that the pickle would import; executes nothing."""
    pickle = read_pickle(path, _MOST_PICKLE_BYTES)
    found: dict[str, None] = {}
    texts: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(pickle):
            if opcode.name in ("GLOBAL", "INST"):
                found[str(argument)] = None
            elif opcode.name == "STACK_GLOBAL":
                found[" ".join(texts[-2:])] = None
            elif "UNICODE" in opcode.name:
                texts.append(str(argument))
            elif opcode.name == "PROTO" and argument != _PICKLE_PROTOCOL:
                raise ValueError(f"pickle protocol {argument}, where torch.save writes {_PICKLE_PROTOCOL}")
    except Exception as error:  # pickletools raises ValueError, UnicodeDecodeError, struct.error, ... on damage
        raise CheckpointError(f"{path}: data.pkl is damaged ({error}): copy or download the file again") from error
    refused = [name.replace(" ", ".") for name in found if name not in _ALLOWED_GLOBALS]
    if refused:
        rest = f" and {len(refused) - 8} more" if len(refused) > 8 else ""
        raise CheckpointError(
            f"{path} holds pickled Python objects ({', '.join(refused[:8])}{rest}), and loading those could run any code; "
            "expected only plain dicts, text, numbers and tensors: in the program that has the model, call "
            "qsparse_export.save(model, config, path), or save_pretrained(...) of transformers"
        )


def _load_tensors(path: Path) -> Any:
    import torch

    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # the unpickler raises whatever a damaged stream leads it into
        raise CheckpointError(
            f"{path} cannot be decoded ({str(error).splitlines()[0][:200] if str(error) else type(error).__name__}): "
            "it is truncated or damaged, copy or download it again"
        ) from error


def _not_ours(path: Path, content: object) -> str:
    import torch

    if isinstance(content, dict) and content and all(isinstance(value, torch.Tensor) for value in content.values()):
        return (
            f"{path} is a bare state dict of {len(content)} tensors (the first is {next(iter(content))!r}) and says nothing "
            "of the model's shape; write it with qsparse_export.save(state_dict, ModelConfig(...), path), or put it "
            "beside its config.json as model.safetensors"
        )
    keys = f"a dict with the keys {', '.join(map(str, list(content)[:6]))}" if isinstance(content, dict) else "no dict"
    return (
        f"{path} holds {keys}; expected format {FORMAT!r}, version, config and state_dict: "
        "write it with qsparse_export.save"
    )


def _require_plain(name: object, tensor: object, source: str) -> None:
    """Raises CheckpointError unless ``tensor`` is a dense floating-point tensor in memory, all of whose data is there."""
    import torch

    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        raise CheckpointError(
            f"{source}: state_dict holds {name!r}: {type(tensor).__name__}; expected names and tensors"
        )
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise CheckpointError(f"{source}: {name} is sparse, quantised or without data; expected a dense tensor")
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise CheckpointError(
            f"{source}: {name} is {tensor.dtype}; expected float32, float16 or bfloat16: convert it before saving"
        )
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        raise CheckpointError(f"{source}: {name} has less data than its shape {list(tensor.shape)} needs: file damaged")


def _tokenizer(stored: object, path: Path) -> TokenizerFiles | None:
    import torch

    if stored is None:
        return None
    files: dict[str, bytes | Path] = {}
    for name, content in (stored if isinstance(stored, dict) else {"?": stored}).items():
        if not (
            name in TOKENIZER_FILES
            and isinstance(content, torch.Tensor)
            and content.dtype == torch.uint8
            and content.is_contiguous()
            and content.numel() <= MOST_FILE_BYTES
        ):
            raise CheckpointError(
                f"{path}: the tokenizer holds {name!r}; expected uint8 tensors named like {', '.join(TOKENIZER_FILES[:3])}"
            )
        files[name] = content.numpy().tobytes()
    return TokenizerFiles(files) if files else None
