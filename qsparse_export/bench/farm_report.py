"""Spells what the devices of a farm measured: one merged table, one JSON document of all reports, or a row per test."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qsparse_export.bench import merged_report
from qsparse_export.bench.measurement import Measurement, nothing_measured
from qsparse_export.bench.merged import failures_of, results_of
from qsparse_export.bench.model_report import flat_rows


def spell(model: str, measured: Sequence[Measurement], failed: Mapping[str, str], format: str) -> str:
    """In ``md``, ``json``, ``jsonl`` or ``csv``; ``failed``: device to the reason why nothing was measured on it."""
    reports = [one.to_dict() for one in measured]
    reports += [nothing_measured(model, {"device": name}, reason) for name, reason in failed.items()]
    if format == "json":
        return json.dumps({"reports": reports}, indent=2)
    if format == "md":
        where = Path(model)
        return merged_report.markdown(
            [result for report in reports for result in results_of(where, report)],
            [failure for report in reports for failure in failures_of(where, report)],
        )
    rows = _rows(model, measured, failed)
    return "\n".join(map(json.dumps, rows)) if format == "jsonl" else _csv(rows)


def _rows(model: str, measured: Sequence[Measurement], failed: Mapping[str, str]) -> list[dict[str, Any]]:
    rows = [{"device": one.machine["device"], **flat, "failed": ""} for one in measured for flat in flat_rows(one)]
    return rows + [{"device": name, "model": model, "failed": reason} for name, reason in failed.items()]


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().rstrip("\n")
