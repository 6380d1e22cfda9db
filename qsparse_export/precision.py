"""What --weights, --head and --activations mean for one model, or why they contradict it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

from qsparse_export.config import ModelConfig
from qsparse_export.errors import UsageError, near_names
from qsparse_export.weight_formats import GROUP_FORMATS, WeightFormats

Weights = Literal["keep", "fp32", "fp16", "ternary", "int8", "int4"]
Head = Literal["keep", "int8", "int4"]
Activations = Literal["fp32", "fp16"]

WEIGHTS: dict[Weights, str] = {
    "keep": "ternary stays ternary, floats become fp32 without loss (fp16 for GPUs)",
    "fp32": "floating point",
    "fp16": "half precision, activations too",
    "ternary": "BitNet quantisation",
    "int8": "8 bits, 128 weights share a scale",
    "int4": "4 bits, 32 weights share a scale",
}
HEADS: tuple[Head, ...] = ("keep", "int8", "int4")
ACTIVATIONS: dict[Activations, str] = {"fp32": "float32", "fp16": "float16"}
"""Names that people choose, and those that torch and NumPy share."""


@dataclass(frozen=True)
class Precision:
    """``config`` with the quantisation that was asked for, ``formats`` of its matrices, ``dtype`` of all that is float."""

    config: ModelConfig
    formats: WeightFormats
    dtype: str

    @property
    def is_quantized(self) -> bool:
        """Whether a matrix becomes n-bit groups, so that the model computes something else than the one that came."""
        return self.formats != WeightFormats()


def dtype_of(weights: Weights, activations: Activations | None, preferred: str) -> str:
    """The number format of activations (a NumPy name); ``preferred`` is the target's, where neither option says it."""
    return next((dtype for name, dtype in ACTIVATIONS.items() if name in (activations, weights)), preferred)


def precision(
    config: ModelConfig,
    weights: Weights = "keep",
    head: Head | None = None,
    activations: Activations | None = None,
    preferred: str = "float32",
) -> Precision:
    """The choices for the model of ``config``; UsageError with the reason where they contradict it or each other.

    ``head`` None: int8 beside int8 or int4 weights, which costs no accuracy that can be measured; else as the model has it.
    ``activations`` None: fp16 beside fp16 weights, fp32 beside fp32 ones, else ``preferred``, which is the target's.
    """
    _require_known("weights", weights, WEIGHTS)
    _require_known("head", head or "keep", HEADS)
    _require_known("activations", activations or "fp32", ACTIVATIONS)
    is_grouped = weights in GROUP_FORMATS
    default = dtype_of(weights, None, preferred)
    if config.quantization == "bitnet":
        _require_fits_bitnet(weights)
    is_float = weights in ("fp32", "fp16") or (weights == "keep" and config.quantization == "none")
    if is_float and activations is not None and ACTIVATIONS[activations] != default:
        raise UsageError(
            f"--weights {weights} with --activations {activations}: floating-point weights have the type of the activations "
            f"that they are multiplied with; use --weights {activations}"
        )
    chosen_head = head or ("int8" if is_grouped else "keep")
    return Precision(
        replace(config, quantization="bitnet") if weights == "ternary" else config,
        WeightFormats(GROUP_FORMATS.get(weights), GROUP_FORMATS.get(chosen_head)),
        ACTIVATIONS[activations] if activations else default,
    )


def _require_known(option: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise UsageError(f"{option} is {value!r}; {near_names(value, known)}")


def _require_fits_bitnet(weights: Weights) -> None:
    if weights == "fp32":
        raise UsageError(
            "a BitNet model computes with ternary weights and int8 activations; use --weights keep or fp16"
        )
    if weights in GROUP_FORMATS:
        raise UsageError(
            f"the weights of a BitNet model are ternary, which is 2 bits without any loss; --weights {weights} would make them "
            f"larger and slower: use --weights keep (the head alone can be quantised: --head {weights})"
        )
