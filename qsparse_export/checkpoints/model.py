"""What every reader returns: a configuration, lazy weights, the tokenizer files, and where all that came from."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qsparse_export.checkpoints.expected import check_config, check_tensors
from qsparse_export.config import ModelConfig
from qsparse_export.errors import CheckpointError
from qsparse_export.tokenizer import TokenizerFiles
from qsparse_export.weights import GroupWeight, StateDict, TernaryWeight, WeightSource

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

SourceFormat = Literal["qsparse-pt", "transformers", "gguf", "pt2", "onnx", "shape", "memory"]
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Program:
    """Any computation on tensors that is not described by a configuration: a module or an exported program.

    ``example_inputs`` are positional; ``dynamic_shapes`` is as for torch.export and None for an exported program.
    """

    module: torch.nn.Module | torch.export.ExportedProgram
    example_inputs: tuple[Any, ...]
    dynamic_shapes: Any = None

    def eager(self) -> torch.nn.Module:
        """The computation as a callable PyTorch module."""
        import torch

        return self.module if isinstance(self.module, torch.nn.Module) else self.module.module()


@dataclass(frozen=True)
class OnnxFile:
    """A graph that another exporter wrote, checked by :mod:`~qsparse_export.checkpoints.onnx_file`."""

    path: Path

    def read(self) -> ir.Model:
        """A fresh copy of the graph; CheckpointError when it is damaged beyond what was seen before."""
        from qsparse_export.checkpoints.onnx_graph import read_graph

        return read_graph(self.path)


@dataclass(frozen=True)
class Model:
    """A loaded model; no weight has been read yet.

    ``weights`` has exactly the tensors of ``checkpoints.expected.expected_shapes(config)``, by Hugging Face names, in
    training form: floating point [N, K] or TernaryWeight. For a generic module or exported program ``config`` is None
    and ``program`` is set, for an ONNX file ``onnx``. ``source`` is the files that were read, the text that a random model
    was made from, or None for a model in memory.
    """

    name: str
    config: ModelConfig | None
    weights: WeightSource
    tokenizer: TokenizerFiles | None
    source_format: SourceFormat
    source: tuple[Path, ...] | str | None
    program: Program | None = None
    onnx: OnnxFile | None = None

    @staticmethod
    def in_memory(name: str, config: ModelConfig, weights: WeightSource) -> Model:
        """A decoder whose weights are at hand, such as ``StateDict(decoder.state_dict())``.

        Raises CheckpointError when the weights are not those that ``config`` implies; a tied head may be there twice.
        """
        check_config(config, name)
        tied = ("lm_head.weight",) if config.tied_embeddings else ()
        check_tensors({n: shape for n, shape in weights.shapes.items() if n not in tied}, config, name)
        return Model(name, config, weights, None, "memory", None)

    @staticmethod
    def of_module(name: str, module: torch.nn.Module, example_inputs: tuple[Any, ...], dynamic_shapes: Any) -> Model:
        """Any module of tensors, with inputs that its forward takes."""
        weights = StateDict(module.state_dict())
        return Model(name, None, weights, None, "memory", None, Program(module, example_inputs, dynamic_shapes))

    @staticmethod
    def of_program(name: str, exported: torch.export.ExportedProgram, source: tuple[Path, ...] | None = None) -> Model:
        """An exported program, read from ``source`` or made in memory.

        Raises CheckpointError when it carries no example inputs, or takes inputs by keyword.
        """
        inputs = exported.example_inputs
        if inputs is None or inputs[1]:
            came = "no example inputs" if inputs is None else f"inputs by keyword ({', '.join(inputs[1])})"
            raise CheckpointError(
                f"the exported program {name} has {came}; expected example inputs, all positional, which the parity check "
                "runs: call torch.export.export(module, (inputs, ...)) and save the result"
            )
        source_format: SourceFormat = "memory" if source is None else "pt2"
        weights = StateDict(exported.state_dict)
        return Model(name, None, weights, None, source_format, source, Program(exported, tuple(inputs[0])))

    @cached_property
    def source_sha256(self) -> str:
        """SHA-256 of the one source file, of ``sha256sum``-like lines for several, of the source text, or, for a model
        in memory, of its configuration and tensors; computed, by reading all of it, when first asked for."""
        if self.source is None:
            plain = json.dumps(self.config.to_dict(), sort_keys=True) if self.config else ""
            return _sha256_of_weights(plain, self.weights)
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


def _sha256_of_weights(config: str, weights: WeightSource) -> str:
    import torch

    digest = hashlib.sha256(config.encode())
    for name in sorted(weights.shapes):
        # A generic module may hold Inf on purpose (masks), so its tensors are taken without the check of read().
        tensor = weights.tensors[name] if isinstance(weights, StateDict) else weights.read(name)
        scale = f" {tensor.scale!r}" if isinstance(tensor, TernaryWeight) else ""
        values = tensor.values if isinstance(tensor, TernaryWeight) else tensor
        if isinstance(values, GroupWeight):
            raise CheckpointError(
                f"{name} is quantised; expected the tensors of a model in memory as they were trained"
            )
        digest.update(f"{name} {values.dtype} {list(values.shape)}{scale}\n".encode())
        if values.numel():
            digest.update(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def model_name(path: Path) -> str:
    """A folder-safe name for the model at ``path``: without suffix and GGUF quantisation tag, only ``A-Za-z0-9._-``."""
    path = path.resolve()
    suffix = r"\.(pt2?|pth|gguf|bin|ckpt|onnx)$"
    name = path.name if path.is_dir() else re.sub(suffix, "", path.name, flags=re.IGNORECASE)
    if not path.is_dir():
        name = re.sub(r"[.-](I?Q\d\w*|TQ\d\w*|B?F16|F32)$", "", name, flags=re.IGNORECASE) or name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "model"
