"""The tokenizer files that travel along with a model: text by file name, bounded in size, never from outside a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qsparse_export.errors import CheckpointError

# What transformers and onnxruntime-genai read beside the weights; anything else stays behind.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
MOST_FILE_BYTES = 256 << 20


@dataclass(frozen=True)
class TokenizerFiles:
    """File name (plain, one of TOKENIZER_FILES) to content: bytes in memory, or the path of a file to copy."""

    files: Mapping[str, bytes | Path]

    def read(self) -> dict[str, bytes]:
        """The content of every file by its name; CheckpointError when one can no longer be read."""
        try:
            return {
                n: content if isinstance(content, bytes) else content.read_bytes() for n, content in self.files.items()
            }
        except OSError as error:
            raise CheckpointError(f"the tokenizer file {error.filename} cannot be read: {error.strerror}") from error


def parse_json_object(text: bytes, source: str) -> dict[str, Any]:
    """The JSON object in ``text``; CheckpointError, beginning with ``source``, for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: bad UTF-8, bad JSON, and integers beyond Python's limit
        raise CheckpointError(f"{source} is not valid JSON ({error}): download or write it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{source} holds a JSON {type(value).__name__}; expected an object of named values")
    return value
