"""``qsparse-bench BUNDLE``: a whole model on this machine, each mode in a process of its own, and what it reads."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qsparse_export.bench import machine
from qsparse_export.bench.dense_graph import DENSE_GRAPH, write_dense_graph
from qsparse_export.bench.density import Activity, measure_activity
from qsparse_export.bench.measurement import Measurement, Mode, ModeActivity, Row, SessionCost
from qsparse_export.bench.plan import Plan, check
from qsparse_export.bench.runner import local_command, process_runner
from qsparse_export.bench.turns import take_turns
from qsparse_export.bundle import Bundle
from qsparse_export.errors import BundleError
from qsparse_export.runtimes.ort import library


@dataclass(frozen=True)
class _Way:
    """How a mode runs: which file is its graph, and whether kernels or function bodies run."""

    mode: Mode
    graph: Path
    native: bool


def measure(bundle: Bundle, plan: Plan, on_step: Callable[[str], object]) -> Measurement:
    """Carries out the plan; ``on_step`` is told what runs next, ``plan.steps`` times.

    Modes take turns; numbers of threads come one after the other, so that no more models are in memory than there are
    modes. Raises UsageError for an impossible plan (:func:`~qsparse_export.bench.plan.check`), TargetError when this
    machine cannot run a mode, BundleError for a bundle that is not as the exporter writes it.
    """
    check(plan, bundle.decoder_shape().max_positions)
    has_kernels = bool(bundle.manifest["native"])
    if has_kernels and set(plan.modes) != {"bodies"}:
        bundle.require_host()
    graph = _graph_file(bundle)
    rows: list[Row] = []
    costs: list[SessionCost] = []
    with tempfile.TemporaryDirectory(prefix="qsparse-bench-") as folder:
        dense = Path(folder) / DENSE_GRAPH
        if "dense" in plan.modes:
            write_dense_graph(graph, dense)
        ways = [_Way(m, dense if m == "dense" else graph, has_kernels and m != "bodies") for m in plan.modes]
        activities = _activities(bundle, ways, plan.activity_tokens, on_step)
        for threads in plan.threads:
            with contextlib.ExitStack() as stack:
                runners = {
                    way.mode: stack.enter_context(
                        process_runner(
                            local_command(bundle.path, way.graph, native=way.native, threads=threads),
                            f"{bundle.path} ({way.mode}, {threads} threads)",
                        )
                    )
                    for way in ways
                }
                timed, cost = take_turns(runners, plan, threads, on_step)
            rows += timed
            costs += cost
    return Measurement(
        model=described(bundle),
        machine=machine.describe(library.open_library() if any(way.native for way in ways) else None),
        repetitions=plan.repetitions,
        rows=tuple(rows),
        sessions=tuple(costs),
        activities=tuple(_of_mode(way, activities[way.graph], costs) for way in ways),
    )


def _graph_file(bundle: Bundle) -> Path:
    names = [name for name in bundle.manifest["files"] if name.endswith(".onnx") and name != DENSE_GRAPH]
    if len(names) != 1:
        raise BundleError(f"{bundle.path} lists {len(names)} .onnx files; expected one graph: export the bundle again")
    return bundle.path / names[0]


def _activities(
    bundle: Bundle, ways: Sequence[_Way], tokens: int, on_step: Callable[[str], object]
) -> dict[Path, Activity]:
    """Of each graph, measured on the first way that runs it."""
    activities: dict[Path, Activity] = {}
    for way in ways:
        if way.graph not in activities:

            def tell(name: str = f"density {way.mode}") -> None:
                on_step(name)

            activities[way.graph] = measure_activity(bundle, way.graph, native=way.native, tokens=tokens, on_token=tell)
    return activities


def _of_mode(way: _Way, activity: Activity, costs: Sequence[SessionCost]) -> ModeActivity:
    used = {op for cost in costs if cost.mode == way.mode for op in cost.variants}
    # Where a body runs instead of a kernel that skips, what is read is up to the runtime, which rewrites it.
    is_known = activity.skipping_ops <= used
    return ModeActivity(
        mode=way.mode,
        tokens=activity.tokens,
        bytes_per_token=activity.bytes_per_token if is_known else None,
        mean_density=activity.mean_density,
        density=activity.density,
        not_native=tuple(sorted(activity.ops - used)) if way.native else (),
    )


def described(bundle: Bundle) -> dict[str, Any]:
    """What tells this bundle from others in a table; values as the manifest has them."""
    manifest = bundle.manifest
    config = manifest["model"]
    sizes = {name: file["bytes"] for name, file in manifest["files"].items()}
    return {
        "name": manifest["name"],
        "target": manifest["target"].get("name"),
        "runtime": manifest["runtime"],
        "native": manifest["native"],
        "weights": manifest.get("weights"),
        "dtype": manifest.get("dtype"),
        "quantization": config.get("quantization"),
        "layers": config.get("layers"),
        "graph_and_weight_bytes": sum(size for name, size in sizes.items() if ".onnx" in name and name != DENSE_GRAPH),
        "qsparse_export": manifest.get("qsparse_export"),
    }
