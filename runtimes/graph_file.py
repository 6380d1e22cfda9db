"""Writes a graph and its weights: one .onnx, one external file beside it, each weight in memory only while it is copied."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir


def write_graph(model: ir.Model, folder: Path, graph: str, weights: str) -> tuple[str, ...]:
    """Writes ``folder/graph`` and ``folder/weights`` (relative, single-level name) one tensor after the other.

    Shows a progress bar on a terminal. Returns the names of the files written: ``weights`` only when a tensor is large.
    """
    import onnx_ir
    from tqdm import tqdm

    total = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    with tqdm(total=total, unit="B", unit_scale=True, desc="weights", disable=None, leave=False) as bar:

        def advance(tensor: ir.TensorProtocol, _: object) -> None:
            bar.update(tensor.nbytes)

        onnx_ir.save(
            model,
            folder / graph,
            external_data=weights,
            callback=advance,
            max_workers=1,  # one weight in memory at a time
            alignment=64,  # a cache line, so that kernels read aligned rows from the mapped file
        )
    return (graph, weights) if (folder / weights).exists() else (graph,)
