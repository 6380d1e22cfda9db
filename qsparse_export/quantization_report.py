"""What quantising to n-bit groups lost: per matrix, and in the logits of the whole model. For the manifest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from qsparse_export.nn.quantized_source import QuantizedSource
    from qsparse_export.weight_formats import GroupFormat, WeightFormats


def quantization_table(formats: WeightFormats, source: QuantizedSource) -> dict[str, Any]:
    """``bits`` and ``group`` of the linears (None: not quantised), the same of the ``head``, and ``layers``.

    Each layer: ``name``, ``bits``, ``group``, and ``relative_error``, the L2 norm of what was lost over that of the matrix.
    ``source`` must have been read, as it is when the graph is written. ``logits`` is what :func:`logit_distance` gives, or
    None when it was not measured.
    """
    layers = []
    for name, error in source.relative_errors.items():
        chosen = source.format_of(name)
        layers.append({"name": name.removesuffix(".weight"), **_plain(chosen), "relative_error": error})
    head = _plain(formats.head) if formats.head else None
    return {**_plain(formats.linears), "head": head, "layers": layers, "logits": None}


def _plain(chosen: GroupFormat | None) -> dict[str, int | None]:
    return {"bits": chosen.bits if chosen else None, "group": chosen.group if chosen else None}


def logit_distance(quantized: np.ndarray, original: np.ndarray) -> dict[str, float]:
    """Of float32 logits [S, vocab] for the same tokens: ``relative_error`` (L2) and ``argmax_agreement`` (share of S)."""
    wide = original.astype(np.float64)
    same = quantized.argmax(axis=-1) == original.argmax(axis=-1)
    error = float(np.linalg.norm(quantized - wide) / max(float(np.linalg.norm(wide)), 1e-30))
    return {"relative_error": error, "argmax_agreement": float(same.mean())}


def summary(table: dict[str, Any]) -> str:
    """One line for people: which formats, mean and worst error of a matrix, and how far the logits moved."""
    parts = [
        f"{what} in {row['bits']} bits"
        for what, row in (("weights", table), ("head", table["head"] or {}))
        if row.get("bits")
    ]
    layers = table["layers"]
    worst = max(layers, key=lambda layer: layer["relative_error"])
    mean = float(np.mean([layer["relative_error"] for layer in layers]))
    line = f"{', '.join(parts)}: relative error {mean:.2%} on average, {worst['relative_error']:.2%} in {worst['name']}"
    if table["logits"] is None:
        return line
    logits = table["logits"]
    return f"{line}; logits {logits['relative_error']:.2%} from the model that came, argmax {logits['argmax_agreement']:.1%}"
