"""qsparse-bench report: merges the JSON of many runs and devices into one table, and one HTML page with plots."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from qsparse_export.cli.console import say
from qsparse_export.errors import MeasurementError

_EPILOG = """\
examples
  qsparse-bench smollm2 --dense --device "Raspberry Pi 5" -o json > pi5.json      on each device, or for each with --remote
  qsparse-bench report pi5.json laptop.json                                       one table
  qsparse-bench report *.json -o report.html                                      and a page with plots

The page is one file that loads nothing: speed against density, decode and prefill, and memory, per device. Plots need
matplotlib (pip install 'qsparse-export[bench]'). Any program that writes the same JSON is welcome: docs/benchmarks.md."""


def parser() -> argparse.ArgumentParser:
    """The command line of ``qsparse-bench report``."""
    made = argparse.ArgumentParser(
        prog="qsparse-bench report",
        description="Merges reports of whole models into one table on stdout, and into one HTML page.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "reports", nargs="+", metavar="FILE.json", type=Path, help="what qsparse-bench BUNDLE -o json printed"
    )
    made.add_argument("-o", "--output", type=Path, metavar="FILE.html", help="also write this page, with plots")
    return made


def command(argv: Sequence[str]) -> None:
    """Merges and prints; raises QSparseError."""
    arguments = parser().parse_args(argv)
    from qsparse_export.bench import merged_report
    from qsparse_export.bench.merged import read_failures, read_reports

    results = read_reports(arguments.reports)
    failures = read_failures(arguments.reports)
    if not results and not failures:
        raise MeasurementError("the reports have no rows; measure something with: qsparse-bench BUNDLE -o json")
    if arguments.output is not None:
        from qsparse_export.bench.plots import plots

        merged_report.write_text(arguments.output, merged_report.html_page(results, plots(results), failures))
        say(f"wrote {arguments.output}")
    print(merged_report.markdown(results, failures), flush=True)
