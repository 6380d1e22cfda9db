"""Tuning: MetaSchedule's runners measure the tilings of each kernel, and its database keeps what they found.

A kernel's workload is the PrimFunc with its default tiling; a record's trace holds one decision, which of the candidates was
measured. Later exports look the fastest up; a kernel that changed since has another workload, and gets its default again.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tvm
from tvm import tirx
from tvm.s_tir import Schedule
from tvm.s_tir import meta_schedule as ms
from tvm.script.ir_builder import IRBuilder
from tvm.support import cc
from tvm.tirx.script.builder import ir as T

from qsparse_export.errors import BundleError, TargetError
from qsparse_export.runtimes.base import Tuning
from qsparse_export.runtimes.tvm.build import linker
from qsparse_export.runtimes.tvm.codegen import lanes_of, runs_here, tvm_target
from qsparse_export.runtimes.tvm.importer import imported
from qsparse_export.runtimes.tvm.kernels.cpu_kernels import CpuKernels
from qsparse_export.runtimes.tvm.kernels.dense_matmul_nbits import dense_matmul_nbits
from qsparse_export.runtimes.tvm.lanes import Lanes
from qsparse_export.runtimes.tvm.session import Program
from qsparse_export.runtimes.tvm.tiling import (
    DefaultTilings,
    Tiling,
    Tilings,
    candidates,
    cores_of,
    head_candidates,
)
from qsparse_export.runtimes.tvm.tracker import Tracker
from qsparse_export.targets.detect import host
from qsparse_export.targets.target import Target

Make = Callable[..., tirx.PrimFunc]
REPEATS = 10
"""Runs of a candidate; before each one the weights are flushed from the caches, as in a model that does not fit them."""
TIMEOUT_SECONDS = 60
_GRACE_SECONDS = 5  # for the server, which ends the session by itself
_POLL_SECONDS = 0.2
_LARGEST_RECORDS = 1000


@dataclass(frozen=True)
class Kernel:
    """A product of a graph: ``make(lanes, **static, tiling=...)``, its candidates the default first."""

    make: Make
    static: tuple[tuple[str, Any], ...]
    tilings: tuple[Tiling, ...]

    @staticmethod
    def of(make: Make, static: Mapping[str, Any], row_bytes: int, cores: int) -> Kernel:
        """With the tilings that there are for it on ``cores``."""
        choices = head_candidates(cores) if make is dense_matmul_nbits else candidates(row_bytes, cores)
        return Kernel(make, tuple(sorted(static.items())), tuple(choices))

    @property
    def label(self) -> str:
        """The op and its sizes."""
        static = dict(self.static)
        outputs = static["n"] if isinstance(static["n"], int) else sum(static["n"])
        return f"{self.make.__name__} {static['k_in']}x{outputs}"

    def module(self, lanes: Lanes, tiling: Tiling) -> tvm.IRModule:
        """The kernel alone, as the function ``main``."""
        function = self.make(lanes, **dict(self.static), tiling=tiling)
        return tvm.IRModule({"main": function.with_attr("global_symbol", "main")})


@dataclass
class RecordedKernels:
    """Default tilings, and a list of the kernels that asked for one: a first import of a graph tells what it is made of."""

    cores: int
    kernels: dict[tuple[Any, ...], Kernel] = field(default_factory=dict)

    def choose(self, make: Make, static: Mapping[str, Any], row_bytes: int) -> Tiling:
        """See :class:`~qsparse_export.runtimes.tvm.tiling.Tilings`."""
        kernel = Kernel.of(make, static, row_bytes, self.cores)
        self.kernels.setdefault((make.__name__, kernel.static), kernel)
        return kernel.tilings[0]


class TunedTilings:
    """The fastest tiling on record for a kernel, and by rule where there is none."""

    def __init__(self, database: Database, cores: int) -> None:
        self._database = database
        self._cores = cores

    def choose(self, make: Make, static: Mapping[str, Any], row_bytes: int) -> Tiling:
        """See :class:`~qsparse_export.runtimes.tvm.tiling.Tilings`."""
        kernel = Kernel.of(make, static, row_bytes, self._cores)
        best = self._database.best(kernel)
        return DefaultTilings(self._cores).choose(make, static, row_bytes) if best is None else kernel.tilings[best]


class Database:
    """MetaSchedule's database in two JSON files of ``folder``, as far as it concerns one target and its ``lanes``."""

    def __init__(self, folder: Path, target: tvm.target.Target, lanes: Lanes) -> None:
        """BundleError for files that are no such database, or cannot be made."""
        self.target = target
        self.lanes = lanes
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name in ("database_workload.json", "database_tuning_record.json"):
                for line in (folder / name).read_text("utf-8").splitlines() if (folder / name).exists() else ():
                    json.loads(line)
            self._records = ms.database.JSONDatabase(work_dir=str(folder))
        except (OSError, ValueError, tvm.error.InternalError) as error:
            raise BundleError(
                f"{folder} holds no tuning database that can be read or written: {str(error).splitlines()[0]}; give another "
                "folder to --tune-db, or delete it"
            ) from error

    def measured(self, kernel: Kernel) -> dict[int, float]:
        """Candidates on record, with the mean seconds of a run."""
        module = kernel.module(self.lanes, kernel.tilings[0])
        if not self._records.has_workload(module):
            return {}
        workload = self._records.commit_workload(module)
        found: dict[int, float] = {}
        for record in self._records.get_top_k(workload, _LARGEST_RECORDS):
            if str(record.target) != str(self.target):
                continue
            choice = int(next(iter(record.trace.decisions.values())))
            seconds = [float(second) for second in record.run_secs]
            found.setdefault(choice, sum(seconds) / len(seconds))
        return {choice: seconds for choice, seconds in found.items() if choice < len(kernel.tilings)}

    def best(self, kernel: Kernel) -> int | None:
        """The fastest candidate, None where nothing is on record."""
        found = self.measured(kernel)
        return min(found, key=lambda choice: found[choice]) if found else None

    def add(self, kernel: Kernel, choice: int, seconds: Sequence[float], arguments: Sequence[Any]) -> None:
        """Appends a measurement; it is on disk when this returns."""
        workload = self._records.commit_workload(kernel.module(self.lanes, kernel.tilings[0]))
        trace = _decision(choice, len(kernel.tilings))
        record = ms.database.TuningRecord(trace, workload, list(seconds), self.target, list(arguments))
        self._records.commit_tuning_record(record)


@dataclass(frozen=True)
class Measurement:
    """One candidate of a kernel, the ``number``-th of ``total``: microseconds, or the ``problem`` why there are none."""

    number: int
    total: int
    kernel: Kernel
    tiling: Tiling
    microseconds: float | None
    problem: str

    @property
    def line(self) -> str:
        """For people."""
        result = f"{self.microseconds:.1f} us" if self.microseconds is not None else f"failed: {self.problem}"
        return f"{self.kernel.label} {self.tiling}: {result}"


def tune(
    kernels: Sequence[Kernel], database: Database, trials: int, compiler: str, tracker: Tracker | None
) -> Iterator[Measurement]:
    """Measures candidates of each kernel that are not on record yet, one after the other, until ``trials`` of it are.

    ``compiler`` links the libraries; they run in a process of their own here, or on a device of the ``tracker``. A
    candidate that fails is told and left out. TargetError when a tracker does not answer or has no such device, or none
    any more; what was measured before is on record.
    """
    chosen = [
        (kernel, choice)
        for kernel, known in ((kernel, database.measured(kernel)) for kernel in kernels)
        for choice in [choice for choice in range(len(kernel.tilings)) if choice not in known][
            : max(trials - len(known), 0)
        ]
    ]
    if not chosen:
        return
    runner = _runner(tracker)
    with tempfile.TemporaryDirectory(prefix="qsparse-tune-") as folder:
        for number, (kernel, choice) in enumerate(chosen, 1):
            module = kernel.module(database.lanes, kernel.tilings[choice])
            library = Path(folder) / f"{number}.so"
            built = tvm.compile(module, target=database.target)
            built.export_library(str(library), fcompile=cc.cross_compiler(compiler))
            arguments = _arguments(module["main"])
            candidate = ms.runner.RunnerInput(str(library), "cpu", arguments)
            if tracker is None:
                result = runner.run([candidate])[0].result()
            else:
                result = _run_on_farm(runner, candidate, tracker, number - 1, len(chosen))
            library.unlink()
            seconds = [float(second) for second in result.run_secs or ()]
            problem = str(result.error_msg).strip().splitlines()[-1] if result.error_msg else ""
            if seconds:
                database.add(kernel, choice, seconds, arguments)
            mean = sum(seconds) / len(seconds) * 1e6 if seconds else None
            yield Measurement(number, len(chosen), kernel, kernel.tilings[choice], mean, problem)


def chosen_tilings(program: Program, target: Target, tuning: Tuning) -> tuple[Tilings, dict[str, Any]]:
    """The tilings of the products of ``program``, measured now as ``tuning`` says or found on record; and a table of them.

    Without ``tuning.database`` the user's own is read if there is one, and written if something is measured. Raises as
    :func:`tune` and :class:`Database` do.
    """
    tracker = measuring_tracker(target, tuning)
    lanes, cores = lanes_of(target), cores_of(target)
    folder = tuning.database or default_database()
    recorded = RecordedKernels(cores)
    imported(program.cut.rest, program.weights, CpuKernels(lanes, recorded))
    kernels = list(recorded.kernels.values())
    if not (tuning.trials or tuning.database or folder.is_dir()):
        return DefaultTilings(cores), {kernel.label: asdict(kernel.tilings[0]) for kernel in kernels}
    database = Database(folder, tvm_target(target), lanes)
    if tuning.trials:
        for measured in tune(kernels, database, tuning.trials, linker(target.triple, host().triple), tracker):
            if tuning.report:
                tuning.report(measured.number, measured.total, measured.line)
    table = {}
    for kernel in kernels:
        best = database.best(kernel)
        on_record = database.measured(kernel)
        entry = asdict(kernel.tilings[best or 0])
        if best is not None:
            entry |= {"microseconds": on_record[best] * 1e6, "candidates_measured": len(on_record)}
            entry |= {"default_microseconds": on_record[0] * 1e6} if 0 in on_record else {}
        table[kernel.label] = entry
    return TunedTilings(database, cores), table


def measuring_tracker(target: Target, tuning: Tuning) -> Tracker | None:
    """Who lends a device to measure on; None where nothing is measured, or this machine does it.

    UsageError for an address that is none, TargetError where code for ``target`` does not run here and no tracker is named.
    """
    if tuning.tracker is not None:
        return Tracker.parse(tuning.tracker, tuning.key or target.name)
    if tuning.trials and not runs_here(target):
        raise TargetError(
            f"this machine cannot measure kernels for target {target.name}: name a device with --tune-rpc HOST:PORT"
        )
    return None


def default_database() -> Path:
    """``$XDG_CACHE_HOME/qsparse-export/tvm-tuning``, by default in ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "qsparse-export" / "tvm-tuning"


def _runner(tracker: Tracker | None) -> Any:
    evaluator = ms.runner.EvaluatorConfig(number=1, repeat=REPEATS, min_repeat_ms=0, enable_cpu_cache_flush=True)
    if tracker is None:
        return ms.runner.LocalRunner(timeout_sec=TIMEOUT_SECONDS, evaluator_config=evaluator)
    config = ms.runner.RPCConfig(tracker.host, tracker.port, tracker.key, session_timeout_sec=TIMEOUT_SECONDS)
    return ms.runner.RPCRunner(config, evaluator)


def _run_on_farm(runner: Any, candidate: Any, tracker: Tracker, done: int, total: int) -> Any:
    """MetaSchedule's result of a run on a device; its runner alone would wait for one that has died for ever.

    TargetError, and the runner is of no more use, when the tracker has none left or the run does not end in its time.
    """
    future = None
    end = time.monotonic() + TIMEOUT_SECONDS + _GRACE_SECONDS
    try:
        while future is None or not future.done():
            tracker.require_device()
            if time.monotonic() > end:
                raise TargetError(
                    f"a device {tracker.key!r} of the tracker at {tracker.host}:{tracker.port} did not finish in "
                    f"{TIMEOUT_SECONDS} s; end what works on it, or restart its server"
                )
            if future is None:
                (future,) = runner.run([candidate])
            time.sleep(_POLL_SECONDS)
    except TargetError as error:
        _end(runner, future)
        if not done:
            raise
        raise TargetError(
            f"after {done} of {total} candidates: {error}; what was measured is on record, and the same command goes on from "
            "there"
        ) from error
    return future.result()


def _end(runner: Any, future: Any) -> None:
    """Ends the process that waits for a device; TVM 0.27's own shutdown would wait for its answer first."""
    for worker in runner.pool._worker_map.values():
        if worker._proc is not None:
            worker._proc.kill()
    end = time.monotonic() + _GRACE_SECONDS
    while future is not None and not future.done() and time.monotonic() < end:
        time.sleep(_POLL_SECONDS)
    if future is None or future.done():
        runner.pool.shutdown()


def _arguments(function: tirx.PrimFunc) -> list[Any]:
    """What a run of one row takes."""
    infos = []
    for parameter in function.params:
        shape = [int(size) if isinstance(size, tirx.IntImm) else 1 for size in parameter.shape]
        infos.append(ms.arg_info.TensorInfo(str(parameter.dtype), shape))
    return infos


def _decision(choice: int, count: int) -> Any:
    """A trace of one decision: the ``choice`` among ``count``. The schedule that it is made on is of an empty kernel."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        x = T.arg("x", T.buffer((1,), "int32"))
        with T.sblock("root"):
            T.buffer_store(x, tirx.const(0, "int32"), [0])
    schedule = Schedule(tvm.IRModule({"main": builder.get()}))
    schedule.sample_categorical(list(range(count)), [1 / count] * count, decision=choice)
    return schedule.trace
