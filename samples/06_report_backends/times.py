"""The table of times: medians beside the peers of the same run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

_HEADER = (
    "| op | M | K | N | bits | density | threads | ours, us | peer | peer, us | peer / ours |",
    "|---|---:|---:|---:|---:|---:|---:|---:|---|---:|---:|",
)


def lines_of(benchmarks: Sequence[Path]) -> list[str]:
    """Where it was measured, and the table."""
    reports = [json.loads(file.read_text("utf-8")) for file in benchmarks]
    machines = dict.fromkeys(report["machine"]["cpu"] for report in reports)
    where = f"On {', '.join(machines)}; a peer and ours in the same run, in turns; more than 1: ours is faster."
    lines = [where, "", *_HEADER]
    for row in (row for report in reports for row in report["rows"]):
        sizes = [row[name] for name in ("op", "m", "k", "n", "bits", "density", "threads")]
        for peer, timing in row["peers"].items():
            measured = [f"{row['median_us']:.0f}", peer, f"{timing['median_us']:.0f}", f"{timing['ratio']:.2f}"]
            lines.append(f"| {' | '.join('' if cell is None else str(cell) for cell in [*sizes, *measured])} |")
    return lines
