"""qsparse-bench BUNDLE: measures a whole model on this machine, or with --remote on another one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qsparse_export.cli import bench_remote, bench_rpc
from qsparse_export.cli.bench_progress import Progress
from qsparse_export.cli.console import print_json, say
from qsparse_export.errors import MeasurementError, QSparseError, TargetError, UsageError

if TYPE_CHECKING:
    from qsparse_export.bench.measurement import Measurement, Mode
    from qsparse_export.bench.plan import Plan
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
  qsparse-bench bitnet-cuda --roofline                        what an H100, an A100, a 4090 or an Orin could do at best
  qsparse-bench --remote pi@raspberrypi smollm2-pi --device "Pi 5" -o json > pi5.json
  qsparse-bench --rpc 127.0.0.1:9190 --key pi5 smollm2-tvm    on every device that a TVM RPC tracker has as "pi5"

--remote needs a bundle that was exported for that device with --with-bench, ssh here and a login there that asks nothing.
It copies what it needs into a new folder in the login's home, runs qsparse-device-bench, and removes the folder again.

--rpc needs a bundle of --runtime tvm and servers of TVM's RPC on the devices, which are measured one after the other and
timed by their own clocks; one that fails has a row that says so. RPC executes whatever anybody sends, in clear text: use
it on loopback and trusted networks only.

Tests are named as in llama-bench: pp512 is the prefill of 512 tokens at once, tg128 the generation of 128 tokens one by
one from an empty cache. Each runs once without counting, then -r times: mean ± standard deviation of tokens per second;
p50 and p90 in ms of one generated token, and of the whole prefill. Modes take turns, so compare modes within one run; a
process of its own runs each of them, and only one works at a time. Weights read per token and density (the share of
input channels that are active) are measured on the generated tokens: docs/benchmarks.md says what each figure means."""


def parser() -> argparse.ArgumentParser:
    """The command line of ``qsparse-bench BUNDLE``."""
    made = argparse.ArgumentParser(
        prog="qsparse-bench",
        usage="qsparse-bench [--remote USER@HOST | --rpc HOST:PORT] BUNDLE [options] | kernels [options] | report FILE.json...",
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
    made.add_argument(
        "--roofline",
        action="store_true",
        help="of a bundle for cuda: what GPUs could do at best, from bytes, launches and data sheets, and what the one here does",
    )
    made.add_argument("--device", metavar="NAME", help="what to call this machine in merged reports")
    made.add_argument("-o", "--output", choices=FORMATS, default="md", help="format (default md)")
    bench_remote.add_options(made)
    bench_rpc.add_options(made)
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
    if arguments.roofline:
        _roofline(arguments)
        return
    bench_remote.require_consistent(arguments)
    bench_rpc.require_consistent(arguments)
    from tqdm import tqdm

    from qsparse_export.bench import model_report
    from qsparse_export.bench.measurement import nothing_measured
    from qsparse_export.bundle import Bundle

    bundle = Bundle.load(arguments.bundle)
    if arguments.rpc:
        bench_rpc.require_bundle(bundle)
    plan = _plan(arguments, bundle)
    with tqdm(disable=None, leave=False) as bar:
        if arguments.rpc:
            bench_rpc.measure(arguments, bundle, plan, Progress(bar))
            return
        try:
            measured = _measure(arguments, bundle, plan, Progress(bar))
        except QSparseError as error:
            if arguments.output == "json":  # one of many devices: a merged report marks it as failed
                machine = {"device": arguments.device or arguments.remote or "this machine"}
                print_json(nothing_measured(bundle.manifest["name"], machine, str(error)))
            raise
    for activity in measured.activities:
        if activity.not_native:
            say(
                f"note: in the mode {activity.mode}, {', '.join(activity.not_native)} ran as function bodies: the "
                f"{'bundle' if arguments.remote else 'installed'}'s kernel library does not have them"
            )
    if arguments.device:
        measured = replace(measured, machine={"device": arguments.device, **measured.machine})
    print(model_report.spell(measured, arguments.output), flush=True)
    if measured.failed:
        raise MeasurementError(f"some modes have no rows: {'; '.join(map(str, measured.failed))}")


def _roofline(arguments: argparse.Namespace) -> None:
    import onnx_ir

    from qsparse_export.bench import gpu
    from qsparse_export.bench.roofline import roofline, spell
    from qsparse_export.bundle import Bundle

    if (
        arguments.remote
        or arguments.rpc
        or arguments.dense
        or arguments.no_native
        or arguments.output not in ("md", "json")
    ):
        raise UsageError("--roofline is of the bundle as it is, on this machine: it goes with -o md or -o json alone")
    bundle = Bundle.load(arguments.bundle)
    bundle.decoder_shape()  # of a decoder, or refused
    if not bundle.is_for_gpu():
        raise UsageError(
            f"{bundle.path} is for {bundle.manifest['target'].get('name')} and the runtime {bundle.manifest['runtime']}, whose "
            "graph no GPU would run so: --roofline is of bundles for ONNX Runtime on NVIDIA GPUs; export it with --target cuda "
            "(--portable does, where nvcc is missing)"
        )
    model = onnx_ir.load(bundle.path / "model.onnx")
    if on_cpu := bundle.manifest["placement"]["cpu"]:
        say(f"note: what falls back to the CPU is not counted: {', '.join(on_cpu)}")
    found = roofline(model)
    measured, reason = None, None
    try:
        name = gpu.require_gpu_for(bundle)
    except TargetError as error:
        reason = str(error)
        say(f"note: nothing was measured, since {reason}")
    else:
        say(f"generating {2 * gpu.TOKENS} tokens on {name}")
        measured = gpu.measure(bundle, model, name)
    if arguments.output == "json":
        plain = {"measured": measured.to_dict() if measured else None, "not_measured": reason}
        print_json({"model": bundle.manifest["name"], **found.to_dict(), **plain})
    else:
        print(spell(found) + (f"\n\n{gpu.spell(measured)}" if measured else ""))


def _plan(arguments: argparse.Namespace, bundle: Bundle) -> Plan:
    """What was asked for; UsageError where the model cannot do it, before anything runs or anybody is asked."""
    from qsparse_export.bench.device import LocalDevice
    from qsparse_export.bench.plan import Plan, check

    find_modes = _remote_modes if arguments.remote or arguments.rpc else _modes
    plan = Plan(
        prompts=tuple(count for count in arguments.prompt if count),
        generations=tuple(count for count in arguments.gen if count),
        repetitions=arguments.repetitions,
        threads=tuple(arguments.threads or [LocalDevice().cores()]),
        modes=find_modes(bundle, dense=arguments.dense, no_native=arguments.no_native),
    )
    check(plan, bundle.decoder_shape().max_positions)
    return plan


def _measure(arguments: argparse.Namespace, bundle: Bundle, plan: Plan, progress: Progress) -> Measurement:
    from qsparse_export.bench.device import Device, LocalDevice

    device: Device = LocalDevice()
    where = ""
    if arguments.remote:
        from qsparse_export.bench.remote import files_to_copy

        files_to_copy(bundle, plan)  # a bundle that lacks any is refused before anybody is asked
        device = bench_remote.connected(arguments, progress.tell)
        plan = replace(plan, threads=tuple(arguments.threads or [device.cores()]))
        where = f" on {arguments.remote}"
    progress.begin(device.steps(bundle, plan), f"measuring {bundle.path}{where}: {', '.join(plan.modes)}")
    return device.measure(bundle, plan, progress.step)


def _remote_modes(bundle: Bundle, *, dense: bool, no_native: bool) -> tuple[Mode, ...]:
    """What to run there: the device itself judges whether it can."""
    first: tuple[Mode, ...] = ("native",) if bundle.manifest["native"] else ("bodies",)
    asked: dict[Mode, bool] = {"bodies": no_native, "dense": dense}
    return tuple(dict.fromkeys((*first, *(mode for mode, is_asked in asked.items() if is_asked))))


def _modes(bundle: Bundle, *, dense: bool, no_native: bool) -> tuple[Mode, ...]:
    """What to run: as the bundle is meant to run, and what was asked for besides."""
    from qsparse_export.errors import TargetError

    asked: dict[Mode, bool] = {"bodies": no_native, "dense": dense}
    extra = [mode for mode, is_asked in asked.items() if is_asked]
    if not bundle.manifest["native"]:
        say("note: the bundle is portable: its function bodies run, not the native kernels")
        return tuple(dict.fromkeys(("bodies", *extra)))
    if no_native:
        bundle.require_bodies()
        try:
            bundle.require_host()
        except TargetError as error:
            say(f"note: no native{' and no dense' if dense else ''} rows, since {error}")
            return ("bodies",)
    return ("native", *extra)
