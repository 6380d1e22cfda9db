"""Runs a bundle on a short prompt and reads off every product how dense its input was and how far kernels and bodies differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qsparse_export.bundle import Bundle
from qsparse_export.inspect.report import Layer, Report, read_graph
from qsparse_export.runtimes.base import SessionView

if TYPE_CHECKING:
    from qsparse_export.runtimes.base import Session


def measured(report: Report, bundle: Bundle) -> Report:
    """``report`` with densities and errors; a decoder reads 24 tokens, another model inputs that are made up.

    Raises TargetError when this machine cannot run the bundle's kernels, UsageError when no inputs can be made up.
    """
    values = [name for layer in report.layers if layer.values for name in layer.values]
    native = bool(bundle.manifest["native"])
    if native:
        bundle.require_host()
    bodies = _values(bundle, values, native=False)
    kernels = _values(bundle, values, native=True) if native else bodies
    selections = _selections(bundle)
    return report.with_layers(
        tuple(_measured(layer, kernels, bodies if native else None, selections) for layer in report.layers)
    )


def _measured(
    layer: Layer,
    ours: Mapping[str, np.ndarray],
    bodies: Mapping[str, np.ndarray] | None,
    selections: Mapping[str, tuple[int, int, str]],
) -> Layer:
    if layer.values is None or layer.values[0] not in ours:
        return layer
    x, y = layer.values
    row = ours[x]
    if y in selections:
        import torch

        from qsparse_export.ops.topk_sparsify import topk_sparsify

        row = topk_sparsify(torch.from_numpy(np.array(row)), *selections[y]).numpy()
    density = float((row != 0).mean()) if row.size else None
    error = None
    if bodies is not None and y in ours and y in bodies:
        difference = ours[y].astype(np.float64) - bodies[y].astype(np.float64)
        norm = float(np.linalg.norm(bodies[y].astype(np.float64)))
        error = float(np.linalg.norm(difference)) / max(norm, 1e-30)
    return replace(layer, measured_density=density, kernel_error=error)


def _selections(bundle: Bundle) -> dict[str, tuple[int, int, str]]:
    """Output of each node with a mask of its own -> k, block, rescale."""
    found = {}
    for node in read_graph(bundle.path):
        attributes = node.attributes
        if node.domain == "ai.qsparse" and {"k", "block", "rescale"} <= set(attributes):
            selection = (attributes["k"].as_int(), attributes["block"].as_int(), attributes["rescale"].as_string())
            found[str(node.outputs[0].name)] = selection
    return found


def _values(bundle: Bundle, names: Sequence[str], *, native: bool) -> dict[str, np.ndarray]:
    from qsparse_export.runtimes import get_runtime

    inputs, outputs = _interface(bundle.path)
    taps = tuple(name for name in dict.fromkeys(names) if name not in inputs and name not in outputs)
    session = get_runtime(bundle.manifest["runtime"]).open(bundle.path, threads=None, native=native, taps=taps)
    recorded = _Recorded(session)
    if bundle.manifest["kind"] == "decoder":
        from qsparse_export.generate import Generator
        from qsparse_export.verify import prompt_ids

        shape = bundle.decoder_shape()
        next(Generator(recorded, shape).steps(prompt_ids(shape.vocab_size, bundle.path / "tokenizer.json")))
    else:
        from qsparse_export.example_inputs import example_feeds

        recorded.run(example_feeds(read_graph(bundle.path), None, batch=1))
    return {name: recorded.values[name] for name in names if name in recorded.values}


def _interface(folder: Path) -> tuple[set[str], set[str]]:
    graph = read_graph(folder)
    return {str(value.name) for value in graph.inputs}, {str(value.name) for value in graph.outputs}


class _Recorded(SessionView):
    """A session whose last inputs and outputs can be read afterwards."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.values: dict[str, np.ndarray] = {}

    def run(self, feeds: Mapping[str, Any], results: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Runs once and keeps what went in and out."""
        outputs = super().run(feeds, results)
        self.values = {name: value for name, value in feeds.items() if isinstance(value, np.ndarray)}
        self.values |= {name: np.asarray(self.to_numpy(value)) for name, value in outputs.items()}
        return outputs
