"""qsparse-bench BUNDLE --rpc HOST:PORT --key KEY: measures a bundle on every device of a TVM RPC tracker."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from qsparse_export.cli.bench_remote import TIMEOUT_SECONDS
from qsparse_export.errors import MeasurementError, QSparseError, UsageError

if TYPE_CHECKING:
    from qsparse_export.bench.measurement import Measurement
    from qsparse_export.bench.plan import Plan
    from qsparse_export.bundle import Bundle
    from qsparse_export.cli.bench_progress import Progress


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds them to ``parser``, as a group."""
    farm = parser.add_argument_group(
        "on the devices of a TVM RPC tracker",
        "RPC is remote code execution in clear text: for loopback and trusted networks only.",
    )
    farm.add_argument("--rpc", metavar="HOST:PORT", help="measure a bundle of the runtime tvm there, on every device")
    farm.add_argument("--key", metavar="KEY", help="the name that the tracker has the devices under")


def require_consistent(arguments: argparse.Namespace) -> None:
    """UsageError when something is said about a tracker and none is named, or can never come to pass."""
    if arguments.rpc is None:
        if arguments.key is not None:
            raise UsageError("--key needs --rpc HOST:PORT: no tracker is asked")
        return
    if arguments.key is None:
        raise UsageError("--rpc needs --key KEY, the name that the tracker has the devices under")
    for name in ("remote", "ssh_option", "onnxruntime", "remote_folder", "unchecked", "device"):
        if getattr(arguments, name):
            raise UsageError(f"--{name.replace('_', '-')} and --rpc exclude each other")
    if arguments.dense or arguments.no_native:
        raise UsageError("--rpc measures compiled kernels alone: leave --dense and --no-native out")


def require_bundle(bundle: Bundle) -> None:
    """BundleError for a bundle of another runtime, TargetError where TVM is missing here; before anybody is asked."""
    from qsparse_export.bench import farm
    from qsparse_export.runtimes.tvm.environment import require_tvm

    farm.require_bundle(bundle)
    require_tvm()


def measure(arguments: argparse.Namespace, bundle: Bundle, plan: Plan, progress: Progress) -> None:
    """Measures on every device and prints; MeasurementError when one of them has no rows."""
    from qsparse_export.bench.farm import activity_here, borrowed
    from qsparse_export.bench.farm_report import spell
    from qsparse_export.runtimes.tvm.tracker import Tracker

    tracker = Tracker.parse(arguments.rpc, arguments.key)
    count = tracker.require_device()
    progress.begin(plan.activity_tokens, f"measuring {bundle.path} on {count} {tracker.key!r} of {arguments.rpc}")
    activity = activity_here(bundle, plan, progress.step)
    done: list[Measurement] = []
    failed: dict[str, str] = {}
    with borrowed(tracker, bundle, activity, arguments.timeout or TIMEOUT_SECONDS, progress.tell) as farm:
        for device in farm.devices:
            its_plan = replace(plan, threads=tuple(arguments.threads or [device.cores()]))
            progress.begin(device.steps(bundle, its_plan))
            try:
                done.append(device.measure(bundle, its_plan, progress.step))
            except QSparseError as error:
                failed[device.name] = str(error)
        failed |= {absent.name: absent.reason for absent in farm.absent}
    progress.begin(0)
    print(spell(bundle.manifest["name"], done, failed, arguments.output), flush=True)
    if failed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise MeasurementError(f"{len(done)} of {len(done) + len(failed)} devices were measured; {reasons}")
