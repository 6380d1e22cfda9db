"""The table of ops: a line for each op, backend and code, with every way in which it was shown."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

PROPERTY = "evidence"
HOW = {
    "executed": "executed",
    "emulated": "emulated",
    "launched": "launched only",
    "compiled": "compiled only",
}
EXECUTED_WHERE_THE_PROCESSOR_HAS_IT = frozenset({"avxvnni", "avx512vnni"})
COLUMNS = 5


def evidence_in(reports: Iterable[Path]) -> list[dict[str, Any]]:
    """Of the tests that passed, in the order of the reports."""
    found = []
    for case in (case for report in reports for case in ElementTree.parse(report).iter("testcase")):
        if any(case.find(name) is not None for name in ("failure", "error", "skipped")):
            continue
        for entry in case.iter("property"):
            if entry.get("name") == PROPERTY:
                found.append(json.loads(entry.get("value", "")))
    return found


def lines_of(found: Iterable[dict[str, Any]]) -> list[str]:
    """The table."""
    shown: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for entry in found:
        shown.setdefault((entry["op"], entry["backend"], entry["code"]), []).append(entry)
    lines = ["| op | backend | code for | shown | largest error, of what is allowed |", "|---|---|---|---|---|"]
    for (op, backend, code), entries in sorted(shown.items()):
        lines.append(f"| {op} | {backend} | {code} | {'; '.join(_ways(entries))} | {_error(entries)} |")
    return lines


def _ways(entries: Sequence[dict[str, Any]]) -> list[str]:
    """Best first, whatever the order in which tests ran."""
    kinds = list(HOW)
    found = sorted({(kinds.index(entry["how"]), entry["by"]) for entry in entries})
    return [HOW[kinds[how]] + (f" ({by})" if by else "") for how, by in found]


def _error(entries: Sequence[dict[str, Any]]) -> str:
    shares = [entry["error_share"] for entry in entries if entry["error_share"] is not None]
    if not shares:
        return ""
    return "the reference's bits" if max(shares) == 0 else f"{max(shares):.0%}"


def without_what_varies(line: str) -> str:
    """A line of a table without its error and what depends on the processor; "" where nothing is left."""
    cells = [cell.strip() for cell in line.strip("| ").split(" | ")] if line.count("|") == COLUMNS + 1 else []
    if len(cells) < COLUMNS - 1:
        return line
    op, backend, code, ways = cells[: COLUMNS - 1]
    shown = ways.split("; ")
    if code in EXECUTED_WHERE_THE_PROCESSOR_HAS_IT:
        shown = [way for way in shown if way != HOW["executed"]]
    return " | ".join((op, backend, code, "; ".join(shown))) if shown else ""
