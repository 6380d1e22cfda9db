"""qsparse-bench BUNDLE: measures a whole model on this machine."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qsparse_export.cli.console import say

if TYPE_CHECKING:
    from qsparse_export.bench.measurement import Mode
    from qsparse_export.bundle import Bundle

FORMATS = ("md", "json", "jsonl", "csv")

EPILOG = """\
commands
  qsparse-bench BUNDLE               a whole model: this page
  qsparse-bench kernels --help       one kernel, beside ONNX Runtime's own and the machine's memory bandwidth
  qsparse-bench report --help        merges the JSON of many runs and devices into one table and page

examples
  qsparse-bench smollm2                                       pp512 and tg128, kernels, all cores
  qsparse-bench smollm2 -p 128 -n 64 -t 1,2 --dense           what sparsity gains: the same weights, every mask open
  qsparse-bench smollm2 -p 0 -n 32 --no-native --dense -r 3   generation only, all three modes
  qsparse-bench smollm2 -o json > smollm2.json

Tests are named as in llama-bench: pp512 is the prefill of 512 tokens at once, tg128 the generation of 128 tokens one by
one from an empty cache. Each runs once without counting, then -r times: mean ± standard deviation of tokens per second;
p50 and p90 in ms of one generated token, and of the whole prefill. Modes take turns, so compare modes within one run; a
process of its own runs each of them, and only one works at a time. Weights read per token and density (the share of
input channels that are active) are measured on the generated tokens: docs/benchmarks.md says what each figure means."""


def parser() -> argparse.ArgumentParser:
    """The command line of ``qsparse-bench BUNDLE``."""
    made = argparse.ArgumentParser(
        prog="qsparse-bench",
        usage="qsparse-bench BUNDLE [options] | kernels [options] | report FILE.json...",
        description="Measures a bundle that qsparse-export wrote: speed, memory, and how sparse it really is.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("bundle", metavar="BUNDLE", help="folder that qsparse-export wrote")
    made.add_argument("-p", "--prompt", type=_counts, default=[512], metavar="P,..", help="prompt tokens (default 512)")
    made.add_argument("-n", "--gen", type=_counts, default=[128], metavar="N,..", help="generated tokens (default 128)")
    made.add_argument("-r", "--repetitions", type=int, default=5, metavar="R", help="of every test (default 5)")
    made.add_argument("-t", "--threads", type=_counts, metavar="T,..", help="threads (default: all cores)")
    made.add_argument("--dense", action="store_true", help="also with every mask open: rows of the mode dense")
    made.add_argument(
        "--no-native",
        action="store_true",
        help="also with the function bodies instead of the kernels: rows of the mode bodies",
    )
    made.add_argument("--device", metavar="NAME", help="what to call this machine in merged reports")
    made.add_argument("-o", "--output", choices=FORMATS, default="md", help="format (default md)")
    return made


def _counts(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected whole numbers separated by commas, such as 1,2") from None
    if min(numbers) < 0:
        raise argparse.ArgumentTypeError(f"{text!r}; expected numbers from 0")
    return list(dict.fromkeys(numbers))


def command(argv: Sequence[str]) -> None:
    """Measures and prints; raises QSparseError."""
    arguments = parser().parse_args(argv)
    from tqdm import tqdm

    from qsparse_export.bench import model_report
    from qsparse_export.bench.model import measure
    from qsparse_export.bench.plan import Plan, check
    from qsparse_export.bundle import Bundle

    bundle = Bundle.load(arguments.bundle)
    plan = Plan(
        prompts=tuple(count for count in arguments.prompt if count),
        generations=tuple(count for count in arguments.gen if count),
        repetitions=arguments.repetitions,
        threads=tuple(arguments.threads or [_cores()]),
        modes=_modes(bundle, dense=arguments.dense, no_native=arguments.no_native),
    )
    check(plan, bundle.decoder_shape().max_positions)
    say(f"measuring {bundle.path}: {', '.join(plan.modes)}")
    with tqdm(total=plan.steps, disable=None, leave=False) as bar:

        def step(name: str) -> None:
            bar.set_description_str(name)
            bar.update()

        measured = measure(bundle, plan, step)
    for activity in measured.activities:
        if activity.not_native:
            say(
                f"note: in the mode {activity.mode}, {', '.join(activity.not_native)} ran as function bodies: the "
                "installed kernel library does not have them"
            )
    if arguments.device:
        measured = replace(measured, machine={"device": arguments.device, **measured.machine})
    print(model_report.spell(measured, arguments.output), flush=True)


def _cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _modes(bundle: Bundle, *, dense: bool, no_native: bool) -> tuple[Mode, ...]:
    """What to run: as the bundle is meant to run, and what was asked for besides."""
    from qsparse_export.errors import TargetError

    asked: dict[Mode, bool] = {"bodies": no_native, "dense": dense}
    extra = [mode for mode, is_asked in asked.items() if is_asked]
    if not bundle.manifest["native"]:
        say("note: the bundle is portable: its function bodies run, not the native kernels")
        return tuple(dict.fromkeys(("bodies", *extra)))
    if no_native:
        try:
            bundle.require_host()
        except TargetError as error:
            say(f"note: no native{' and no dense' if dense else ''} rows, since {error}")
            return ("bodies",)
    return ("native", *extra)
