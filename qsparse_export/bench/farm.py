"""``qsparse-bench --rpc``: measures a bundle of the runtime tvm on every device that a TVM RPC tracker has under a name."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qsparse_export.bench.density import Activity, measure_activity
from qsparse_export.bench.measurement import Measurement, ModeActivity, Row, SessionCost
from qsparse_export.bench.model import described
from qsparse_export.bench.prompt import first_token
from qsparse_export.bench.runner import Conversation, conversation
from qsparse_export.errors import BundleError, MeasurementError, QSparseError

if TYPE_CHECKING:
    from qsparse_export.bench.plan import Plan
    from qsparse_export.bundle import Bundle
    from qsparse_export.runtimes.tvm.tracker import Tracker

CHECKED_TOKENS = 8
"""The first greedy tokens of a device must be those that the graph gives here; later ones may part at a near tie."""
WAIT_SECONDS = 30.0
"""How long to wait until a device of the tracker is free."""
_START_SECONDS = 120.0
_SOURCE = "measured where qsparse-bench ran, on the tokens that the device was fed"


@dataclass(frozen=True)
class RpcDevice:
    """A device that a tracker lent. See :class:`qsparse_export.bench.device.Device`.

    ``name`` is the tracker's for it with its address, ``threads`` what its server runs with unless told otherwise.
    ``activity`` is that of the same graph on this machine, whose tokens the device is fed and has to choose.
    """

    talk: Conversation
    name: str
    threads: int
    activity: Activity
    timeout_s: float

    def cores(self) -> int:
        """See :class:`qsparse_export.bench.device.Device`: the threads of the server's pool."""
        return self.threads

    def steps(self, bundle: Bundle, plan: Plan) -> int:
        """See :class:`qsparse_export.bench.device.Device`."""
        return 2 + len(plan.threads) * len(plan.tests)

    def measure(self, bundle: Bundle, plan: Plan, on_step: Callable[[str], object]) -> Measurement:
        """See :class:`qsparse_export.bench.device.Device`.

        TargetError when the device cannot load the module, fails, goes away or is too slow for ``timeout_s``;
        MeasurementError when it chooses other tokens.
        """
        with self.talk.within(self.timeout_s):
            on_step(f"{self.name}: copy")
            self.talk.ask({"open": True})
            on_step(f"{self.name}: check tokens")
            agree = self._agreeing(self._fed(bundle, len(self.activity.greedy_ids)))
            rows = [row for threads in plan.threads for row in self._rows(bundle, plan, threads, on_step)]
            calls = self.talk.ask({"native_calls": True})["native_calls"]
        costs = tuple(
            SessionCost("native", threads, None, None, None, None, None, variants=calls) for threads in plan.threads
        )
        return Measurement(
            model=described(bundle),
            machine={"device": self.name, "cpu": self.name, "cores": self.threads, "onnxruntime": None},
            repetitions=plan.repetitions,
            rows=tuple(rows),
            sessions=costs,
            activities=(_of_mode(self.activity),),
            device={"checked_tokens": {"native": {"agree": agree, "of": len(self.activity.greedy_ids)}}},
        )

    def _rows(self, bundle: Bundle, plan: Plan, threads: int, on_step: Callable[[str], object]) -> Iterator[Row]:
        self.talk.ask({"threads": threads})
        for test, tokens in plan.tests:
            on_step(f"{self.name}: {test} t{threads}")
            what = {"generate": self._fed(bundle, tokens)} if test.startswith("tg") else {"prefill": tokens}
            samples = self.talk.ask({**what, "repetitions": plan.repetitions})["samples_s"]
            yield Row.of(test, "native", threads, tokens, samples)

    def _fed(self, bundle: Bundle, tokens: int) -> list[int]:
        return [first_token(bundle.manifest["model"]), *self.activity.greedy_ids[: tokens - 1]]

    def _agreeing(self, fed: list[int]) -> int:
        """How many of the tokens that the device chooses are those of this machine; MeasurementError for other first ones."""
        expected = self.activity.greedy_ids
        chosen = self.talk.ask({"choose": fed})["chosen"]
        for number, (there, here) in enumerate(zip(chosen, expected, strict=True), 1):
            if there != here and number <= CHECKED_TOKENS:
                raise MeasurementError(
                    f"{self.name} chose token {there} after {number} tokens, and the same graph here {here}: what it computes "
                    "is wrong, so that nothing was timed; export the bundle for that device"
                )
        return sum(there == here for there, here in zip(chosen, expected, strict=True))


@dataclass(frozen=True)
class Absent:
    """A device that the tracker has and that could not be borrowed, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Farm:
    """The devices under one name of a tracker, held until the end, so that each one is another."""

    devices: tuple[RpcDevice, ...]
    absent: tuple[Absent, ...]


def require_bundle(bundle: Bundle) -> None:
    """BundleError for a bundle that no RPC server can run."""
    if bundle.manifest["runtime"] != "tvm":
        raise BundleError(
            f"{bundle.path} was exported for the runtime {bundle.manifest['runtime']}, and servers of TVM's RPC run modules of "
            "the runtime tvm: export it with --runtime tvm, or measure this one with --remote USER@HOST"
        )
    if "cuda" in bundle.manifest["target"]["features"]:
        raise BundleError(
            f"{bundle.path} was exported for {bundle.manifest['target']['name']}, and over TVM's RPC a module runs on the "
            "CPU of a device: run qsparse-bench on the device itself, or export for its CPU"
        )


def activity_here(bundle: Bundle, plan: Plan, on_step: Callable[[str], object]) -> Activity:
    """What the graph, compiled for this machine, chooses and reads: the measure of every device."""
    return measure_activity(
        bundle,
        bundle.path / "model.onnx",
        native=True,
        tokens=plan.activity_tokens,
        on_token=lambda: on_step("density and tokens, here"),
    )


@contextlib.contextmanager
def borrowed(
    tracker: Tracker, bundle: Bundle, activity: Activity, timeout_s: float, tell: Callable[[str], object]
) -> Iterator[Farm]:
    """Every device that becomes free in time, ready to be measured; ``timeout_s`` is what one may take for all of it.

    TargetError when no tracker answers, or when it has no such device. ``tell`` is told how far the copying is.
    """
    addresses = tracker.devices()
    devices: list[RpcDevice] = []
    reasons: list[str] = []
    with contextlib.ExitStack() as held:
        for number, _ in enumerate(addresses, 1):
            request = {
                "bundle": str(bundle.path),
                "tracker": f"{tracker.host}:{tracker.port}",
                "key": tracker.key,
                "wait_s": WAIT_SECONDS,
                # A server must also wait until those before it were measured.
                "timeout_s": _START_SECONDS * len(addresses) + timeout_s * number,
            }
            # -P: a file called json.py in the working directory must not be imported.
            command = (sys.executable, "-P", "-m", "qsparse_export.bench.rpc_process", json.dumps(request))
            talk = held.enter_context(conversation(command, tracker.key, tell))
            try:
                with talk.within(_START_SECONDS):
                    answer = talk.read()
            except QSparseError as error:
                reasons.append(str(error))
                continue
            talk.name = f"{tracker.key} {answer['address']}"
            devices.append(RpcDevice(talk, talk.name, answer["threads"], activity, timeout_s))
        found = {device.name for device in devices}
        others = [name for name in (f"{tracker.key} {address}" for address in addresses) if name not in found]
        yield Farm(tuple(devices), tuple(map(Absent, others, reasons)))


def _of_mode(activity: Activity) -> ModeActivity:
    return ModeActivity(
        mode="native",
        tokens=activity.tokens,
        bytes_per_token=activity.bytes_per_token,
        mean_density=activity.mean_density,
        density=activity.density,
        source=_SOURCE,
    )
