"""Reads the JSON of whole-model benchmarks, of any runner on any device, into one list that can be compared."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qsparse_export.bench.measurement import MODES
from qsparse_export.errors import MeasurementError

_MOST_BYTES = 64 << 20
_LIMIT = 1e300  # beyond it lie infinity, NaN, and whole numbers that no float holds
_LONGEST_REASON = 400
_TEST = re.compile(r"(pp|tg)[0-9]{1,9}")
_NUMBERS_OF_ROWS = ("tokens_per_s_mean", "tokens_per_s_std", "p50_ms", "p90_ms")


@dataclass(frozen=True)
class Result:
    """One row of one report, with what its mode took. None where the report does not say.

    ``device`` is the name that the report was given, else its processor, else its file; ``density`` the share of active
    channels of all block linears; ``test`` is ``pp512`` or ``tg128`` (:class:`~qsparse_export.bench.measurement.Row`).
    """

    device: str
    model: str
    test: str
    mode: str
    threads: int
    tokens_per_s_mean: float
    tokens_per_s_std: float
    p50_ms: float
    p90_ms: float
    density: float | None
    ttft_ms: float | None
    load_ms: float | None
    peak_rss_bytes: float | None
    bytes_per_token: float | None
    variants: str

    @property
    def is_decode(self) -> bool:
        """Whether tokens were generated one by one."""
        return self.test.startswith("tg")


@dataclass(frozen=True)
class Failed:
    """What one report could not measure. ``mode`` and ``threads`` are empty where that is all of them."""

    device: str
    model: str
    mode: str
    threads: str
    reason: str


def read_reports(paths: Iterable[Path]) -> tuple[Result, ...]:
    """The rows of all files, in order. MeasurementError names the first file that is no report, and what is wrong."""
    return tuple(result for path in paths for plain in _read(path) for result in results_of(path, plain))


def read_failures(paths: Iterable[Path]) -> tuple[Failed, ...]:
    """What the reports say has failed, in order; raises as :func:`read_reports`."""
    return tuple(failed for path in paths for plain in _read(path) for failed in failures_of(path, plain))


def failures_of(path: Path, plain: Mapping[str, Any]) -> list[Failed]:
    """What one report says has failed; ``path`` is where it is from."""
    device, model = _names(path, plain)
    return [
        Failed(
            device=device,
            model=model,
            mode=_label(entry["mode"]) if entry.get("mode") else "",
            threads=_label(entry["threads"]) if entry.get("threads") else "",
            reason="".join(c for c in str(entry.get("reason")) if c.isprintable())[:_LONGEST_REASON],
        )
        for entry in _tables(plain, "failed")
    ]


def _names(path: Path, plain: Mapping[str, Any]) -> tuple[str, str]:
    """Of the device and of the model."""
    machine, model = _table(plain, "machine"), _table(plain, "model")
    return _label(machine.get("device") or machine.get("cpu") or path.stem), _label(model.get("name") or path.stem)


def _read(path: Path) -> list[Mapping[str, Any]]:
    """The reports of a file: it is one, or has several as ``reports``, as qsparse-bench BUNDLE --rpc prints them."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise MeasurementError(f"{path} has {path.stat().st_size} bytes; a report has a few thousand")
        plain = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise MeasurementError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise MeasurementError(
            f"{path} is not JSON ({error}); expected what qsparse-bench BUNDLE -o json prints"
        ) from error
    several = plain.get("reports") if isinstance(plain, dict) else None
    reports = several if isinstance(several, list) and several else [plain]
    for report in reports:
        if not isinstance(report, dict) or not isinstance(report.get("rows"), list):
            raise MeasurementError(f"{path} has no rows; expected what qsparse-bench BUNDLE -o json prints")
    return reports


def results_of(path: Path, plain: Mapping[str, Any]) -> list[Result]:
    """The rows of one report, as values; ``path`` is where it is from. MeasurementError says what is wrong with it."""
    device, name = _names(path, plain)
    first_mode = plain["rows"][0].get("mode") if plain["rows"] and isinstance(plain["rows"][0], dict) else None
    costs = {(cost.get("mode"), cost.get("threads")): cost for cost in _tables(plain, "sessions")}
    activities = {activity.get("mode"): activity for activity in _tables(plain, "activities")}
    results = []
    for number, row in enumerate(plain["rows"], 1):
        where = f"{path}, row {number}"
        test, mode, threads = _key(row, where)
        # What a runner tells of its first mode only stands at the top.
        top = plain if mode == first_mode else {}
        cost, activity = costs.get((mode, threads), top), activities.get(mode, top)
        numbers = {key: _number(row.get(key), f"{where}: {key}") for key in _NUMBERS_OF_ROWS}
        results.append(
            Result(
                device=device,
                model=name,
                test=test,
                mode=mode,
                threads=threads,
                **numbers,
                density=_density(activity, where),
                ttft_ms=_known(cost, "ttft_ms", path),
                load_ms=_known(cost, "load_ms", path),
                peak_rss_bytes=_known(cost, "peak_rss_bytes", path),
                bytes_per_token=_known(activity, "bytes_per_token", path),
                variants=_variants(cost),
            )
        )
    return results


def _key(row: object, where: str) -> tuple[str, str, int]:
    """Test, mode and threads of a row."""
    if not isinstance(row, dict):
        raise MeasurementError(f"{where} is {row!r:.80}; expected an object")
    if "op" in row:
        raise MeasurementError(f"{where} is of qsparse-bench kernels; expected reports of whole models")
    test, mode, threads = row.get("test"), row.get("mode"), row.get("threads")
    if not isinstance(test, str) or not _TEST.fullmatch(test):
        raise MeasurementError(f"{where}: test is {test!r:.80}; expected one such as pp512 or tg128")
    if mode not in MODES or isinstance(threads, bool) or not isinstance(threads, int):
        raise MeasurementError(
            f"{where}: mode {mode!r:.80}, threads {threads!r:.80}; expected one of {', '.join(MODES)} and a number"
        )
    return test, mode, threads


def _label(value: object) -> str:
    """A name that somebody else chose, fit for a table: one line, not endless."""
    return "".join(c for c in str(value) if c.isprintable())[:80]


def _table(plain: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = plain.get(key)
    return value if isinstance(value, dict) else {}


def _tables(plain: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    value = plain.get(key)
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LIMIT:
        raise MeasurementError(f"{where} is {value!r}; expected a finite number")
    return float(value)


def _known(table: Mapping[str, Any], key: str, path: Path) -> float | None:
    return None if table.get(key) is None else _number(table[key], f"{path}: {key}")


def _density(activity: Mapping[str, Any], where: str) -> float | None:
    """The runner's own mean where it gives one, else the plain mean of the projections."""
    if activity.get("mean_density") is not None:
        return _number(activity["mean_density"], f"{where}: mean_density")
    shares = [share for share in _table(activity, "density").values() if share is not None]
    return _mean([_number(share, f"{where}: density") for share in shares])


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _variants(cost: Mapping[str, Any]) -> str:
    calls = [value for value in _table(cost, "variants").values() if isinstance(value, dict)]
    return " ".join(sorted({_label(name) for variants in calls for name in variants}))
