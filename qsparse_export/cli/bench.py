"""qsparse-bench: measures whole models (cli.bench_model), or one kernel beside ONNX Runtime's own and the machine's limits."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence

from qsparse_export.bench.report import FORMATS
from qsparse_export.cli import bench_model, bench_report
from qsparse_export.cli.console import run, say

_EPILOG = """\
examples
  qsparse-bench kernels --k 2560 --n 6912 --density 0.4,1 -t 1,2 --peers ort
  qsparse-bench kernels --k 4096 --n 14336 --op nbits --density 0.5 --peers ort,tvm
  qsparse-bench kernels --op topk --k 2560,6912 --density 0.4 -t 1 -o json
  qsparse-bench kernels --m 128 --k 2560 --n 6912 --density 1 -t 2 --variant avx2

Every option with numbers takes a list (1,2,4); all combinations are measured. Contenders run in turn in one process, so
compare figures of one run only. Weights cycle through 256 MB of distinct contents; --hot keeps one matrix in the cache."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run(_command, argv)


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _floats(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def parser() -> argparse.ArgumentParser:
    """The command line of ``qsparse-bench kernels``."""
    kernels = argparse.ArgumentParser(
        prog="qsparse-bench kernels",
        description="Times one kernel: min, median and p90, bytes, and the machine's own bandwidth beside it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kernels.add_argument("--op", default="ternary", metavar="OP", help="ternary (default), nbits, head or topk")
    kernels.add_argument("--m", type=_integers, default=[1], metavar="M,..", help="rows of x: tokens (default 1)")
    kernels.add_argument("--k", type=_integers, default=[2560], metavar="K,..", help="inputs (default 2560)")
    kernels.add_argument("--n", type=_integers, default=[6912], metavar="N,..", help="outputs (default 6912)")
    kernels.add_argument(
        "--density", type=_floats, metavar="D,..", help="share of active channels (default 0.4; the head has 1)"
    )
    kernels.add_argument("-t", "--threads", type=_integers, default=[1], metavar="T,..", help="threads (default 1)")
    kernels.add_argument("--bits", type=int, default=4, metavar="B", help="of nbits and head: 4 (default) or 8")
    kernels.add_argument(
        "--group", type=int, default=128, metavar="G", help="of nbits and head: inputs that share a scale (default 128)"
    )
    kernels.add_argument("--variant", metavar="NAME", help="force this kernel variant (default: the fastest here)")
    kernels.add_argument("--hot", action="store_true", help="one matrix, which stays in the cache")
    kernels.add_argument(
        "--peers",
        default="",
        metavar="P,..",
        help="ort: ONNX Runtime's MatMulNBits or TopK; tvm: the op as TVM compiles it",
    )
    kernels.add_argument(
        "--seconds", type=float, default=1.0, metavar="S", help="per contender and case, at least 5 rounds (default 1)"
    )
    kernels.add_argument("-o", "--output", choices=FORMATS, default="md", help="format (default md)")
    return kernels


def _command(argv: Sequence[str]) -> None:
    if argv[:1] == ["kernels"]:
        _kernels(argv[1:])
    elif argv[:1] == ["report"]:
        bench_report.command(argv[1:])
    else:
        bench_model.command(argv)


def _kernels(argv: Sequence[str]) -> None:
    arguments = parser().parse_args(argv)
    from qsparse_export.bench import kernels, report

    densities = arguments.density or ([1.0] if arguments.op == "head" else [0.4])
    outputs = arguments.n if arguments.op != "topk" else [1]
    peers = tuple(filter(None, arguments.peers.split(",")))
    cases = [
        kernels.Case(
            arguments.op,
            m,
            k,
            n,
            density,
            threads,
            arguments.variant,
            arguments.hot,
            peers,
            arguments.bits,
            arguments.group,
        )
        for m, k, n, density, threads in itertools.product(
            arguments.m, arguments.k, outputs, densities, arguments.threads
        )
    ]
    for case in cases:
        kernels.check(case)  # all of them before the first is measured
    rows = []
    for position, case in enumerate(cases, 1):
        say(f"[{position}/{len(cases)}] m {case.m} k {case.k} n {case.n} density {case.density} threads {case.threads}")
        rows.append(kernels.measure(case, arguments.seconds))
    print(report.spell(kernels.describe(), rows, arguments.output), flush=True)
