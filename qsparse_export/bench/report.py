"""Spells the rows of a kernel benchmark: a Markdown table, JSON or CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

FORMATS = ("md", "json", "csv")
_NUMBERS = {"density": "g", "limit_fraction": ".0%"}
_HEADINGS = {
    "op": "op",
    "variant": "variant",
    "m": "M",
    "k": "K",
    "n": "N",
    "bits": "bits",
    "density": "density",
    "threads": "threads",
    "min_us": "min us",
    "median_us": "median us",
    "p90_us": "p90 us",
    "active_bytes": "active bytes",
    "total_bytes": "total bytes",
    "active_gb_per_s": "active GB/s",
    "stream_gb_per_s": "machine stream GB/s",
    "gather_gb_per_s": "machine gather GB/s",
    "limit_fraction": "of the limit",
    "gops": "GOPS",
}


def spell(machine: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], format: str) -> str:
    """``rows`` of :func:`qsparse_export.bench.kernels.measure` in one of ``FORMATS``."""
    if format == "json":
        return json.dumps({"machine": dict(machine), "rows": [dict(row) for row in rows]}, indent=2)
    return _csv(rows) if format == "csv" else _markdown(machine, rows)


def _peer_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["peers"]))


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    peers = _peer_names(rows)
    figures = ("min_us", "median_us", "p90_us", "ratio", "min_ratio")
    plain = [name for name in rows[0] if name != "peers"] if rows else []
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*plain, *(f"{peer}_{figure}" for peer in peers for figure in figures)])
    for row in rows:
        measured = [row["peers"].get(peer, {}).get(figure) for peer in peers for figure in figures]
        writer.writerow([*(row[name] for name in plain), *measured])
    return text.getvalue().rstrip("\n")


def _markdown(machine: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    peers = _peer_names(rows)
    headings = [*_HEADINGS.values(), *(title for peer in peers for title in (f"{peer} median us", f"x {peer}"))]
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, ONNX Runtime {machine['onnxruntime']}; "
        f"weights {'in the cache' if rows and rows[0]['hot'] else 'cold'}",
        "",
        _line(headings),
        _line(["---"] * len(headings)),
    ]
    for row in rows:
        cells = [_cell(name, row[name]) for name in _HEADINGS]
        for peer in peers:
            timing = row["peers"].get(peer)
            cells += [f"{timing['median_us']:.1f}", f"{timing['ratio']:.2f}"] if timing else ["", ""]
        lines.append(_line(cells))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return format(value, _NUMBERS.get(name, ".1f"))
    return str(value)
