"""Reads the JSON that a device's own program wrote, which is judged before it is believed, as a Measurement."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qsparse_export.bench.measurement import MODES, Failure, Measurement, Mode, ModeActivity, Row, SessionCost
from qsparse_export.errors import MeasurementError
from qsparse_export.runtimes.base import NativeCalls

DEVICE_KEYS = ("program", "checked_tokens", "state_before", "state_after", "energy")
"""What only a program on the device tells: docs/benchmarks.md."""
_LIMIT = 1e300  # beyond it lie infinity, NaN, and whole numbers that no float holds


def measurement_of(text: str) -> Measurement:
    """The report ``text``. MeasurementError names what is missing or of another kind, or why every mode failed."""
    try:
        plain = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MeasurementError(f"the report is not JSON ({error})") from error
    top = _object(plain, "the report")
    failed = tuple(_failure(entry) for entry in _objects(top, "failed"))
    sessions = tuple(_session(entry) for entry in _objects(top, "sessions"))
    if not sessions:
        raise MeasurementError(
            f"every mode failed ({'; '.join(map(str, failed))})" if failed else "the report has no sessions"
        )
    activities = tuple(_activity(entry) for entry in _objects(top, "activities"))
    rows = tuple(_row(entry) for entry in _objects(top, "rows"))
    known, costs = {entry.mode for entry in activities}, {(cost.mode, cost.threads) for cost in sessions}
    for row in rows:
        if row.mode not in known or (row.mode, row.threads) not in costs:
            raise MeasurementError(f"the report has no session and activity of {row.mode} on {row.threads} threads")
    model, machine = _object(top.get("model"), "model"), _object(top.get("machine"), "machine")
    for table, name, keys in (
        (model, "model", ("name", "graph_and_weight_bytes")),
        (machine, "machine", ("cpu", "cores", "onnxruntime")),
    ):
        for key in keys:
            if key not in table:
                raise MeasurementError(f"{name} of the report has no {key}")
    _number(model, "graph_and_weight_bytes")
    return Measurement(
        model=model,
        machine=machine,
        repetitions=_whole(top, "repetitions"),
        rows=rows,
        sessions=sessions,
        activities=activities,
        failed=failed,
        device={key: top[key] for key in DEVICE_KEYS if key in top},
    )


def _row(entry: Mapping[str, Any]) -> Row:
    samples = entry.get("samples_tokens_per_s", [])
    if not isinstance(samples, list):
        raise MeasurementError(f"samples_tokens_per_s is {samples!r:.80}; expected a list")
    return Row(
        test=_text(entry, "test"),
        mode=_mode(entry),
        threads=_whole(entry, "threads"),
        tokens_per_s_mean=_number(entry, "tokens_per_s_mean"),
        tokens_per_s_std=_number(entry, "tokens_per_s_std"),
        p50_ms=_number(entry, "p50_ms"),
        p90_ms=_number(entry, "p90_ms"),
        samples_tokens_per_s=tuple(
            _number({"samples_tokens_per_s": value}, "samples_tokens_per_s") for value in samples
        ),
    )


def _session(entry: Mapping[str, Any]) -> SessionCost:
    return SessionCost(
        mode=_mode(entry),
        threads=_whole(entry, "threads"),
        load_ms=_number(entry, "load_ms"),
        first_run_ms=_optional(entry, "first_run_ms"),
        ttft_ms=_optional(entry, "ttft_ms"),
        peak_rss_bytes=_whole(entry, "peak_rss_bytes"),
        rss_before_load_bytes=_whole(entry, "rss_before_load_bytes"),
        variants=_calls(entry),
    )


def _calls(entry: Mapping[str, Any]) -> NativeCalls:
    calls = _object(entry.get("variants"), "variants")
    return {op: {name: _whole(_object(counts, op), name) for name in counts} for op, counts in calls.items()}


def _activity(entry: Mapping[str, Any]) -> ModeActivity:
    density = _object(entry.get("density"), "density")
    not_native = entry.get("not_native", [])
    if not isinstance(not_native, list) or not all(isinstance(op, str) for op in not_native):
        raise MeasurementError(f"not_native is {not_native!r:.80}; expected a list of ops")
    return ModeActivity(
        mode=_mode(entry),
        tokens=_whole(entry, "tokens"),
        bytes_per_token=_optional(entry, "bytes_per_token"),
        mean_density=_optional(entry, "mean_density"),
        density={linear: _optional(density, linear) for linear in density},
        not_native=tuple(not_native),
        source=_text(entry, "source"),
    )


def _failure(entry: Mapping[str, Any]) -> Failure:
    threads = None if entry.get("threads") is None else _whole(entry, "threads")
    return Failure(None if entry.get("mode") is None else _mode(entry), threads, _text(entry, "reason"))


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise MeasurementError(f"{what} is {value!r:.80}; expected a JSON object")
    return value


def _objects(table: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    entries = table.get(key)
    if not isinstance(entries, list):
        raise MeasurementError(f"{key} is {entries!r:.80}; expected a list")
    return [_object(entry, f"an entry of {key}") for entry in entries]


def _mode(table: Mapping[str, Any]) -> Mode:
    for mode in MODES:
        if table.get("mode") == mode:
            return mode
    raise MeasurementError(f"mode is {table.get('mode')!r:.80}; expected one of {', '.join(MODES)}")


def _text(table: Mapping[str, Any], key: str) -> str:
    value = table.get(key)
    if not isinstance(value, str):
        raise MeasurementError(f"{key} is {value!r:.80}; expected a text")
    return "".join(c for c in value if c.isprintable())


def _number(table: Mapping[str, Any], key: str) -> float:
    value = table.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LIMIT:
        raise MeasurementError(f"{key} is {value!r:.80}; expected a finite number")
    return value


def _whole(table: Mapping[str, Any], key: str) -> int:
    value = _number(table, key)
    if value != int(value):
        raise MeasurementError(f"{key} is {value!r}; expected a whole number")
    return int(value)


def _optional(table: Mapping[str, Any], key: str) -> float | None:
    return None if table.get(key) is None else _number(table, key)
