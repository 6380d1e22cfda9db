"""Zip archives written by PyTorch: told apart and checked from their listing, before anything inside is decoded."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Literal

from qsparse_export.errors import CheckpointError

ArchiveKind = Literal["torch-save", "torchscript", "pt2", "unknown"]


def archive_kind(path: Path) -> ArchiveKind:
    """What the archive's member names say that it is; CheckpointError when it is truncated or damaged.

    torch.save stores all members uncompressed, which mapping them into memory needs; one with compressed members, which
    could grow without bound, is refused.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except Exception as error:  # zipfile raises many kinds on damaged archives: struct.error, NotImplementedError, ...
        raise CheckpointError(
            f"{path} begins like a zip archive (torch.save, .pt2) and is not a whole one ({error}): "
            "it is truncated or damaged, copy or download it again"
        ) from error
    names = {member.filename.partition("/")[2] for member in members}
    if any(name.startswith("models/") or name == "serialized_exported_program.json" for name in names):
        return "pt2"
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        return "torchscript"
    if "data.pkl" not in names:
        return "unknown"
    size = path.stat().st_size
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.file_size > size:
            raise CheckpointError(
                f"{path}: the archive member {member.filename!r} is compressed or larger than the file; expected members "
                "stored as torch.save and torch.export.save store them: save the model again"
            )
    return "torch-save"


def read_pickle(path: Path, most_bytes: int) -> bytes:
    """The undecoded ``data.pkl`` of a torch.save archive; CheckpointError when it is damaged or over ``most_bytes``."""
    try:
        with zipfile.ZipFile(path) as archive:
            member = next(info for info in archive.infolist() if info.filename.partition("/")[2] == "data.pkl")
            if member.file_size > most_bytes:
                raise CheckpointError(
                    f"{path}: data.pkl has {member.file_size} bytes, where names and shapes of tensors take far less"
                )
            return archive.read(member)
    except CheckpointError:
        raise
    except Exception as error:  # as above
        raise CheckpointError(f"{path}: data.pkl is damaged ({error}): copy or download the file again") from error
