"""Files of a checkpoint folder, fetched by plain name only: nothing outside the folder is ever opened."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

from qsparse_export.errors import CheckpointError
from qsparse_export.tokenizer import MOST_FILE_BYTES, TOKENIZER_FILES, TokenizerFiles, parse_json_object

_MOST_JSON_BYTES = 64 << 20


def member(folder: Path, name: object, most_bytes: int | None = None) -> Path:
    """The path of the regular file ``name`` directly inside ``folder``.

    Raises CheckpointError for a name with a path in it, for a missing or special file, for a link that leads out of
    the folder (only Hugging Face's own cache, ``snapshots/REVISION`` with links into ``blobs``, is understood), and
    for more than ``most_bytes``.
    """
    if not isinstance(name, str) or name in ("", "..") or name != Path(name).name or {"\\", "\0"} & set(name):
        raise CheckpointError(
            f"{folder}: the file name {name!r} leads out of the folder; expected the plain name of a file inside it"
        )
    path = folder / name
    try:
        status = path.stat()
        resolved = path.resolve(strict=True)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: {name} cannot be opened ({error.strerror}): copy or download the whole folder again"
        ) from error
    if not any(resolved.is_relative_to(root) for root in trusted_roots(folder)):
        raise CheckpointError(
            f"{folder}: {name} is a link to {resolved}, outside the folder; copy the file itself into the folder"
        )
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{folder}: {name} is not a regular file; expected a file with data")
    if most_bytes is not None and status.st_size > most_bytes:
        raise CheckpointError(
            f"{folder}: {name} has {status.st_size} bytes; expected at most {most_bytes}: it is not what its name says"
        )
    return path


def has_member(folder: Path, name: str) -> bool:
    """Whether there is an entry of that name, also a broken link."""
    path = folder / name
    return path.exists() or path.is_symlink()


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of the folder; CheckpointError when it is missing, too large or malformed."""
    return parse_json_object(member(folder, name, _MOST_JSON_BYTES).read_bytes(), f"{folder}: {name}")


def tokenizer_files(folder: Path) -> TokenizerFiles | None:
    """Those of TOKENIZER_FILES that the folder holds; None when there is nothing to tokenise with."""
    files = {name: member(folder, name, MOST_FILE_BYTES) for name in TOKENIZER_FILES if has_member(folder, name)}
    usable = ("tokenizer.json", "tokenizer.model", "vocab.json")
    return TokenizerFiles(files) if any(name in files for name in usable) else None


def trusted_roots(folder: Path) -> list[Path]:
    """Where the files of ``folder`` may lie: in it, or in the blobs of Hugging Face's own cache."""
    folder = folder.resolve()
    return [folder, folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [folder]
