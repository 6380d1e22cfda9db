"""What qsparse-device-bench needs in a bundle besides itself: the dense graph, and how active the channels are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qsparse_export.bench.dense_graph import DENSE_GRAPH, write_dense_graph
from qsparse_export.bench.density import Activity, measure_activity
from qsparse_export.bench.plan import ACTIVITY_TOKENS
from qsparse_export.bundle import Bundle


def add_device_files(folder: Path, graph: str, manifest: dict[str, Any]) -> dict[str, Any]:
    """Writes dense.onnx into the bundle ``folder`` and returns the section ``bench`` of its manifest.

    ``graph`` is the name of the bundle's graph; ``manifest`` describes a decoder so far. On the device nothing can be read
    from inside a graph without writing another one, so that density and bytes per token are measured here, on the tokens
    that the device generates too: the first ones from an empty cache.
    """
    dense = folder / DENSE_GRAPH
    write_dense_graph(folder / graph, dense)
    bundle = Bundle(folder, manifest)
    tokens = min(ACTIVITY_TOKENS, bundle.decoder_shape().max_positions)

    def measured(file: Path) -> dict[str, Any]:
        activity = measure_activity(bundle, file, native=bool(manifest["native"]), tokens=tokens, on_token=lambda: None)
        return _plain(activity)

    return {"sparse": measured(folder / graph), "dense": measured(dense)}


def _plain(activity: Activity) -> dict[str, Any]:
    return {
        "tokens": activity.tokens,
        "greedy_ids": list(activity.greedy_ids),
        "bytes_per_token": activity.bytes_per_token,
        "mean_density": activity.mean_density,
        "density": activity.density,
        "skipping_ops": sorted(activity.skipping_ops),
        "ops": sorted(activity.ops),
    }
