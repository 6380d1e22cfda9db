"""Spells a whole-model benchmark: Markdown tables, JSON, one JSON line per row, or CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qsparse_export.bench.measurement import MEASURED_HERE, Measurement, ModeActivity, Row, SessionCost

FORMATS = ("md", "json", "jsonl", "csv")


def spell(measured: Measurement, format: str) -> str:
    """``measured`` in one of ``FORMATS``."""
    if format == "json":
        return json.dumps(measured.to_dict(), indent=2)
    if format == "jsonl":
        return "\n".join(json.dumps(flat) for flat in flat_rows(measured))
    return _csv(flat_rows(measured)) if format == "csv" else _markdown(measured)


def flat_rows(measured: Measurement) -> list[dict[str, Any]]:
    """Each row with what its mode and session took beside it: plain values, the same keys in every row."""
    costs = {(cost.mode, cost.threads): cost for cost in measured.sessions}
    activities = {activity.mode: activity for activity in measured.activities}
    flat = []
    for row in measured.rows:
        cost, activity = costs[row.mode, row.threads], activities[row.mode]
        flat.append(
            {
                "model": measured.model["name"],
                "cpu": measured.machine["cpu"],
                "test": row.test,
                "mode": row.mode,
                "threads": row.threads,
                "tokens_per_s_mean": row.tokens_per_s_mean,
                "tokens_per_s_std": row.tokens_per_s_std,
                "p50_ms": row.p50_ms,
                "p90_ms": row.p90_ms,
                "ttft_ms": cost.ttft_ms,
                "load_ms": cost.load_ms,
                "peak_rss_bytes": cost.peak_rss_bytes,
                "bytes_per_token": activity.bytes_per_token,
                "mean_density": activity.mean_density,
                "variants": variant_names(cost.variants),
            }
        )
    return flat


def variant_names(variants: Mapping[str, Mapping[str, int]]) -> str:
    """The kernel variants that ran, such as ``avx2``; empty where none did."""
    return " ".join(sorted({name for calls in variants.values() for name in calls}))


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().rstrip("\n")


def _markdown(measured: Measurement) -> str:
    machine, model = measured.machine, measured.model
    lines = [
        f"{model['name']} ({_size(model['graph_and_weight_bytes'])}), {machine['cpu']}, {machine['cores']} cores, "
        f"ONNX Runtime {machine['onnxruntime']}, {measured.repetitions} repetitions",
        *_device_lines(measured.device),
        "",
        *_rows_table(measured.rows),
        "",
        *_sessions_table(measured.sessions, {activity.mode: activity for activity in measured.activities}),
    ]
    for activity in measured.activities:
        if activity.mode != "bodies" or len(measured.activities) == 1:
            lines += ["", *_density_table(activity)]
    return "\n".join(lines)


def _device_lines(device: Mapping[str, Any]) -> list[str]:
    """What a program on the device tells besides: tokens that agree with the recorded ones, and how hot it became."""
    lines = []
    checked = device.get("checked_tokens")
    if isinstance(checked, dict):
        agree = [
            f"{mode} {found.get('agree')} of {found.get('of')}" if isinstance(found, dict) else f"{mode} unchecked"
            for mode, found in checked.items()
        ]
        lines.append(f"tokens as recorded at export: {', '.join(agree)}")
    before, after = (_hottest(device.get(key)) for key in ("state_before", "state_after"))
    if before is not None and after is not None:
        lines.append(f"hottest sensor: {before:.0f} °C before, {after:.0f} °C after")
    return ["", *lines] if lines else []


def _hottest(state: object) -> float | None:
    sensors = state.get("temperature_celsius") if isinstance(state, dict) else None
    values = sensors.values() if isinstance(sensors, dict) else ()
    return max((value for value in values if isinstance(value, int | float)), default=None)


def _rows_table(rows: Sequence[Row]) -> list[str]:
    dense = {(row.test, row.threads): row for row in rows if row.mode == "dense"}
    headings = ["test", "mode", "threads", "tokens/s", "p50 ms", "p90 ms", *(["x dense"] if dense else [])]
    cells = []
    for row in rows:
        line = [row.test, row.mode, str(row.threads), f"{row.tokens_per_s_mean:.2f} ± {row.tokens_per_s_std:.2f}"]
        line += [f"{row.p50_ms:.2f}", f"{row.p90_ms:.2f}"]
        if dense:
            line.append(f"{row.tokens_per_s_mean / dense[row.test, row.threads].tokens_per_s_mean:.2f}")
        cells.append(line)
    return _table(headings, cells)


def _sessions_table(costs: Sequence[SessionCost], activities: Mapping[str, ModeActivity]) -> list[str]:
    headings = ["mode", "threads", "load ms", "first run ms", "TTFT ms", "peak RSS", "read per token", "variants"]
    cells = []
    for cost in costs:
        activity = activities[cost.mode]
        ran = variant_names(cost.variants) or "none"
        if activity.not_native:
            ran += f" (function bodies: {', '.join(activity.not_native)})"
        times = [_milliseconds(value) for value in (cost.load_ms, cost.first_run_ms, cost.ttft_ms)]
        sizes = [_size(cost.peak_rss_bytes), _size(activity.bytes_per_token)]
        cells.append([cost.mode, str(cost.threads), *times, *sizes, ran])
    return _table(headings, cells)


def _density_table(activity: ModeActivity) -> list[str]:
    """Per projection, over the layers: which is what anybody reads; the JSON has every linear."""
    by_projection: dict[str, list[float]] = {}
    for linear, share in activity.density.items():
        if share is not None:
            by_projection.setdefault(linear.rpartition(".")[2], []).append(share)
    cells = [
        [name, f"{sum(shares) / len(shares):.3f}", f"{min(shares):.3f}", f"{max(shares):.3f}", str(len(shares))]
        for name, shares in by_projection.items()
    ]
    if activity.mean_density is not None:
        cells.append(["all, by weight bytes", f"{activity.mean_density:.3f}", "", "", ""])
    source = "" if activity.source == MEASURED_HERE else f" ({activity.source})"
    return _table([f"density, {activity.mode}{source}", "mean", "least", "most", "linears"], cells)


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [_line(headings), _line(["---"] * len(headings)), *map(_line, rows)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _size(nbytes: float | None) -> str:
    return "" if nbytes is None else f"{nbytes / 1e6:.1f} MB"
