"""A folder written by transformers' ``save_pretrained``, read without transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from qsparse_export.checkpoints.bitnet import BitNetLinear, bitnet_linears
from qsparse_export.checkpoints.expected import block_linears, check_tensors
from qsparse_export.checkpoints.folder import has_member, member, read_json, tokenizer_files
from qsparse_export.checkpoints.model import Model, model_name
from qsparse_export.checkpoints.safetensors_files import StoredTensor, open_folder, require_float
from qsparse_export.checkpoints.transformers_config import read_config
from qsparse_export.errors import CheckpointError
from qsparse_export.weights import TernaryWeight, require_finite

if TYPE_CHECKING:
    import torch

CONFIG_FILE = "config.json"
_GENERATION_FILE = "generation_config.json"
# Buffers that old versions saved; both are recomputed from the configuration.
_RECOMPUTED = re.compile(r".*\.(rotary_emb\.inv_freq|masked_bias)")


@dataclass(frozen=True)
class FolderWeights:
    """A WeightSource over safetensors files: plain tensors, and ternary linears unpacked on reading."""

    plain: Mapping[str, StoredTensor]
    ternary: Mapping[str, BitNetLinear]

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name to logical shape; linears are [N, K] also when packed."""
        plain = {name: tensor.shape for name, tensor in self.plain.items()}
        return plain | {name: linear.shape for name, linear in self.ternary.items()}

    def read(self, name: str) -> torch.Tensor | TernaryWeight:
        """One tensor; CheckpointError on NaN, Inf, damaged data or codes that are not ternary."""
        if name in self.ternary:
            return self.ternary[name].read(name)
        tensor = self.plain[name].read(name)
        require_finite(name, tensor)
        return tensor


def read_transformers_folder(folder: Path) -> Model:
    """Raises CheckpointError when the folder is incomplete, unsafe, contradictory or of an unknown architecture."""
    source = str(folder)
    if not has_member(folder, CONFIG_FILE):
        raise CheckpointError(
            f"{folder} is a folder without {CONFIG_FILE}; expected a folder written by transformers' save_pretrained "
            "(config.json, model.safetensors, tokenizer files), or name a .pt, .gguf or .pt2 file itself"
        )
    plain = read_json(folder, CONFIG_FILE)
    generation = read_json(folder, _GENERATION_FILE) if has_member(folder, _GENERATION_FILE) else {}
    read = read_config(plain, generation, f"{folder}: {CONFIG_FILE}")
    stored, files = open_folder(folder)
    linears = block_linears(read.model)
    ternary = bitnet_linears(stored, linears, read.storage, source)
    scales = {name.removesuffix(".weight") + ".weight_scale" for name in ternary}
    floats = {
        name: tensor
        for name, tensor in stored.items()
        if name not in ternary and name not in scales and not _RECOMPUTED.fullmatch(name)
    }
    if read.model.tied_embeddings:
        floats.pop("lm_head.weight", None)  # transformers ties it to the embedding, whatever the file holds
    weights = FolderWeights(floats, ternary)
    check_tensors(weights.shapes, read.model, source)
    require_float(floats, source)
    return Model(
        name=model_name(folder),
        config=read.model,
        weights=weights,
        tokenizer=tokenizer_files(folder),
        source_format="transformers",
        source=(member(folder, CONFIG_FILE), *files),
    )
