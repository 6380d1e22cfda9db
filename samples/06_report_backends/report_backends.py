#!/usr/bin/env python3
"""What each op was shown to do on each backend and for each target: a page made of test reports and benchmarks.

    make test  # writes build/tests.xml
    qsparse-bench kernels --m 1,128 --k 2560 --n 13824 --density 0.4,1 -t 1,2 --peers ort,tvm -o json > ternary.json
    qsparse-bench kernels --op nbits --m 1,128 --k 4096 --n 14336 --density 0.5,1 -t 1,2 --peers ort,tvm -o json > nbits.json
    qsparse-bench kernels --op head --k 2560 --n 128256 -t 1,2 --peers ort,tvm -o json > head.json
    qsparse-bench kernels --op topk --m 1,128 --k 2560,6912 --density 0.4 -t 1 --peers ort,tvm -o json > topk.json
    python samples/06_report_backends/report_backends.py build/tests.xml {ternary,nbits,head,topk}.json -o docs/backends.md

Tests say in their reports what they have shown (tests/evidence.py): of an op, on a backend, as code for an instruction set or
architecture, executed, emulated, launched or compiled only, and how much of the error that the op's definition allows it
used. Only tests that passed count. --check FILE: exit code 1 where FILE's tables of ops and of targets are not those of the
reports; errors are not compared, nor what a test executes only where the processor has the instructions.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import by_op
import by_target
import times
from by_op import evidence_in

TIMES = "## Times"
WAYS = """\
*Executed*: on the processor of the machine that ran the tests. *Emulated*: by another program that does what the
instructions of that processor, or the threads of that GPU, are defined to do. *Launched only*: ONNX Runtime's
provider ran every node, on libraries whose kernels compute nothing. *Compiled only*: machine code came out, and nothing ran
it. An error is the largest that any case had, as a share of what the op's definition allows (`qsparse_export/ops`), or of a
model's parity limit; most cases have none.
"""
LETTERS = """\
The same by target and runtime, for the code that runs there: the best instruction set that the target is described with
(`targets/*.toml`). On Android and macOS it is the code that was shown on Linux. **X** executed, **E** emulated, **L**
launched, **C** compiled, **B** its function body, in whole models. Empty: not shown, or no op there.
"""


def page(reports: Sequence[Path], benchmarks: Sequence[Path]) -> str:
    """The whole page."""
    found = evidence_in(reports)
    commands = [line for line in (__doc__ or "").splitlines() if line.startswith("    ")]
    return "\n".join(
        [
            "# What was shown of each op on each backend and for each target",
            "",
            "<!-- made by samples/06_report_backends/report_backends.py -->",
            "Made of test reports and benchmarks (the latter with `--seconds 0.5`), not by hand:",
            "",
            "```",
            *(line.removeprefix("    ") for line in commands),
            "```",
            "",
            WAYS,
            *by_op.lines_of(found),
            "",
            "## Targets",
            "",
            LETTERS,
            *by_target.lines_of(found),
            "",
            TIMES,
            "",
            *times.lines_of(benchmarks),
            "",
        ]
    )


def differences(old: str, new: str) -> list[str]:
    """Lines of the tables that one of two pages has and the other lacks, times left out."""

    def rows(text: str) -> list[str]:
        table = [line for line in text.split(TIMES)[0].splitlines() if line.startswith("| ")]
        return [kept for line in table if (kept := by_op.without_what_varies(line))]

    before, after = rows(old), rows(new)
    return [
        *(f"no longer shown: {row}" for row in before if row not in set(after)),
        *(f"not on the page: {row}" for row in after if row not in set(before)),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "files", type=Path, nargs="+", help="JUnit files of pytest (.xml), and .json of qsparse-bench kernels"
    )
    parser.add_argument("-o", "--out", type=Path, help="the page (default: stdout)")
    parser.add_argument("--check", type=Path, metavar="FILE", help="a page that must have the tables of these reports")
    arguments = parser.parse_args(argv)
    by_kind = {kind: [file for file in arguments.files if file.suffix == kind] for kind in (".xml", ".json")}
    made = page(by_kind[".xml"], by_kind[".json"])
    if arguments.check:
        found = differences(arguments.check.read_text("utf-8"), made)
        for line in found:
            print(line, file=sys.stderr)
        if found:
            print(f"make {arguments.check} again: --help says how", file=sys.stderr)
        return 1 if found else 0
    if arguments.out:
        arguments.out.write_text(made, "utf-8")
    else:
        print(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
