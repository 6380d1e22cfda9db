#!/usr/bin/env python3
"""What each op was shown to do on each backend: a page made of test reports and benchmarks.

    pytest --junitxml=tests.xml
    qsparse-bench kernels --k 2560 --n 13824 --density 0.4,1 -t 1,2 --peers ort,tvm -o json > ternary.json
    qsparse-bench kernels --op nbits --k 4096 --n 14336 --density 0.5,1 -t 1,2 --peers ort,tvm -o json > nbits.json
    qsparse-bench kernels --op head --k 2560 --n 128256 -t 1,2 --peers ort,tvm -o json > head.json
    qsparse-bench kernels --op topk --k 2560,6912 --density 0.4 -t 1 --peers ort,tvm -o json > topk.json
    python samples/06_report_backends/report_backends.py tests.xml ternary.json nbits.json head.json topk.json -o docs/backends.md

Tests say in their reports what they have shown (tests/evidence.py): of an op, on a backend, as code for an instruction set or
architecture, executed, emulated or compiled only, and how much of the error that the op's definition allows it used. Only
tests that passed count. --check FILE: exit code 1 where the page's first table would lose a line that FILE has.
"""

from __future__ import annotations

import argparse
import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

PROPERTY = "evidence"
HOW = {"executed": "executed", "emulated": "emulated", "compiled": "compiled only"}
_TIMES = (
    "| op | M | K | N | bits | density | threads | ours, us | peer | peer, us | peer / ours |",
    "|---|---:|---:|---:|---:|---:|---:|---:|---|---:|---:|",
)


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
    """The table: a line for each op, backend and code, with every way in which it was shown."""
    shown: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for entry in found:
        shown.setdefault((entry["op"], entry["backend"], entry["code"]), []).append(entry)
    lines = ["| op | backend | code for | shown | largest error, of what is allowed |", "|---|---|---|---|---|"]
    for (op, backend, code), entries in sorted(shown.items()):
        ways = dict.fromkeys(HOW[entry["how"]] + (f" ({entry['by']})" if entry["by"] else "") for entry in entries)
        lines.append(f"| {op} | {backend} | {code} | {'; '.join(ways)} | {_error(entries)} |")
    return lines


def _error(entries: Sequence[dict[str, Any]]) -> str:
    shares = [entry["error_share"] for entry in entries if entry["error_share"] is not None]
    if not shares:
        return ""
    return "the reference's bits" if max(shares) == 0 else f"{max(shares):.0%}"


def times_of(benchmarks: Iterable[Path]) -> list[str]:
    """Medians beside the peers of the same run."""
    lines = [*_TIMES]
    for file in benchmarks:
        for row in json.loads(file.read_text("utf-8"))["rows"]:
            sizes = [row[name] for name in ("op", "m", "k", "n", "bits", "density", "threads")]
            for peer, timing in row["peers"].items():
                cells = [
                    *sizes,
                    f"{row['median_us']:.0f}",
                    peer,
                    f"{timing['median_us']:.0f}",
                    f"{timing['ratio']:.2f}",
                ]
                lines.append(f"| {' | '.join('' if cell is None else str(cell) for cell in cells)} |")
    return lines


def page(reports: Sequence[Path], benchmarks: Sequence[Path]) -> str:
    """The whole page."""
    machines = dict.fromkeys(json.loads(file.read_text("utf-8"))["machine"]["cpu"] for file in benchmarks)
    commands = [line for line in (__doc__ or "").splitlines() if line.startswith("    ")]
    return "\n".join(
        [
            "# What was shown of each op on each backend",
            "",
            "<!-- made by samples/06_report_backends/report_backends.py -->",
            "Made of test reports and benchmarks, not by hand:",
            "",
            "```",
            *(line.removeprefix("    ") for line in commands),
            "```",
            "",
            "*Executed*: on the processor of the machine that ran the tests. *Emulated*: by another program that does what the",
            "instructions of that processor, or the threads of that GPU, are defined to do. *Compiled only*: machine code came",
            "out, and nothing ran it. An error is the largest that any case had, as a share of what the op's definition allows",
            "(`qsparse_export/ops`); most cases have none.",
            "",
            *lines_of(evidence_in(reports)),
            "",
            "## Times",
            "",
            f"On {', '.join(machines)}; a peer and ours in the same run, in turns; more than 1: ours is faster.",
            "",
            *times_of(benchmarks),
            "",
        ]
    )


def lost(old: str, new: str) -> list[str]:
    """What the first table of ``old`` has and that of ``new`` lacks: op, backend and code."""

    def keys(text: str) -> list[str]:
        table = text.split("## Times")[0]
        return [" ".join(line.split("|")[1:4]) for line in table.splitlines() if line.startswith("|")]

    return [key for key in keys(old) if key not in set(keys(new))]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "files", type=Path, nargs="+", help="JUnit files of pytest (.xml), and .json of qsparse-bench kernels"
    )
    parser.add_argument("-o", "--out", type=Path, help="the page (default: stdout)")
    parser.add_argument("--check", type=Path, metavar="FILE", help="a page that the new one must not fall behind")
    arguments = parser.parse_args(argv)
    by_kind = {kind: [file for file in arguments.files if file.suffix == kind] for kind in (".xml", ".json")}
    made = page(by_kind[".xml"], by_kind[".json"])
    if arguments.check:
        missing = lost(arguments.check.read_text("utf-8"), made)
        for line in missing:
            print(f"no longer shown: {' '.join(line.split())}", file=sys.stderr)
        return 1 if missing else 0
    if arguments.out:
        arguments.out.write_text(made, "utf-8")
    else:
        print(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
