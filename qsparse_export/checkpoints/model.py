"""What every reader returns: a configuration, lazy weights, the tokenizer files, and where all that came from."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qsparse_export.config import ModelConfig
from qsparse_export.tokenizer import TokenizerFiles
from qsparse_export.weights import WeightSource

if TYPE_CHECKING:
    import torch

SourceFormat = Literal["qsparse-pt", "transformers", "gguf", "pt2", "shape"]
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Model:
    """A loaded model; no weight has been read yet.

    ``config`` is None for a generic exported program, whose graph is ``program``. ``weights`` has exactly the tensors
    of ``checkpoints.expected.expected_shapes(config)``, by Hugging Face names, in training form: floating point [N, K]
    or TernaryWeight. ``source`` is the files that were read, or the text that a random model was made from.
    """

    name: str
    config: ModelConfig | None
    weights: WeightSource
    tokenizer: TokenizerFiles | None
    source_format: SourceFormat
    source: tuple[Path, ...] | str
    program: torch.export.ExportedProgram | None = None

    @cached_property
    def source_sha256(self) -> str:
        """SHA-256 of the one source file, of ``sha256sum``-like lines for several, or of the source text; reads them."""
        if isinstance(self.source, str):
            return hashlib.sha256(self.source.encode()).hexdigest()
        if len(self.source) == 1:
            return _sha256(self.source[0])
        lines = [f"{_sha256(path)}  {path.name}\n" for path in sorted(self.source, key=lambda path: path.name)]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def model_name(path: Path) -> str:
    """A folder-safe name for the model at ``path``: without suffix and GGUF quantisation tag, only ``A-Za-z0-9._-``."""
    path = path.resolve()
    name = path.name if path.is_dir() else re.sub(r"\.(pt2?|pth|gguf|bin|ckpt)$", "", path.name, flags=re.IGNORECASE)
    if not path.is_dir():
        name = re.sub(r"[.-](I?Q\d\w*|TQ\d\w*|B?F16|F32)$", "", name, flags=re.IGNORECASE) or name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "model"
