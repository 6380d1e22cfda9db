"""What a whole-model benchmark measured, as values; any runner on any device can fill them, and their JSON is one form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from qsparse_export.runtimes.base import NativeCalls

Mode = Literal["native", "bodies", "dense"]
MODES: tuple[Mode, ...] = ("native", "bodies", "dense")
"""The kernels; the function bodies; the same weights with every mask open, run as the bundle is run."""

MEASURED_HERE = "measured in this run"
"""The source of an activity that the machine that was timed found itself."""


@dataclass(frozen=True)
class Row:
    """One test in one mode. ``test``: ``pp512`` (a prefill of 512 tokens) or ``tg128`` (128 generated ones).

    Tokens per second are mean and sample standard deviation over the repetitions, ``samples_tokens_per_s``. ``p50_ms`` and
    ``p90_ms`` are those of one token in a generation, and of the whole prefill.
    """

    test: str
    mode: Mode
    threads: int
    tokens_per_s_mean: float
    tokens_per_s_std: float
    p50_ms: float
    p90_ms: float
    samples_tokens_per_s: tuple[float, ...] = ()

    @staticmethod
    def of(test: str, mode: Mode, threads: int, tokens: int, samples_s: Sequence[Sequence[float]]) -> Row:
        """From the seconds of each repetition: one per token, or one for the whole prefill of ``tokens``."""
        rates = np.array([tokens / sum(seconds) for seconds in samples_s])
        every = np.concatenate([np.asarray(seconds) for seconds in samples_s]) * 1e3
        return Row(
            test=test,
            mode=mode,
            threads=threads,
            tokens_per_s_mean=float(rates.mean()),
            tokens_per_s_std=float(rates.std(ddof=1)) if len(rates) > 1 else 0.0,
            p50_ms=float(np.median(every)),
            p90_ms=float(np.percentile(every, 90)),
            samples_tokens_per_s=tuple(map(float, rates)),
        )


@dataclass(frozen=True)
class SessionCost:
    """What one mode took on a number of threads, in a process of its own.

    ``load_ms``: files to a model ready to run, files in the page cache. ``first_run_ms``: the first prompt ever, chosen
    token included; ``ttft_ms``: median of the later ones (both None without a prompt). ``peak_rss_bytes``: all memory
    resident at once at most (interpreter, runtime, file-mapped weights, activations), of which
    ``rss_before_load_bytes`` were there before the model. ``variants``: native kernel calls of the whole session. None: a
    runner that has no program on the device cannot tell.
    """

    mode: Mode
    threads: int
    load_ms: float | None
    first_run_ms: float | None
    ttft_ms: float | None
    peak_rss_bytes: int | None
    rss_before_load_bytes: int | None
    variants: NativeCalls


@dataclass(frozen=True)
class ModeActivity:
    """What a mode reads of the weights, measured over ``tokens`` generated tokens.

    ``bytes_per_token`` counts active channels only where a kernel skips the others, and is None where the bodies of such
    kernels ran: what those read is up to the runtime, which rewrites them. ``density``: linear to the share of its input
    channels that are active; ``mean_density``: the same for all of them, weighted by their bytes. ``not_native``: ops of
    the graph that ran as function bodies although kernels were asked for. ``source`` says where the figures come from.
    """

    mode: Mode
    tokens: int
    bytes_per_token: float | None
    mean_density: float | None
    density: dict[str, float | None]
    not_native: tuple[str, ...] = ()
    source: str = MEASURED_HERE


@dataclass(frozen=True)
class Failure:
    """What could not be measured, and why; None: every mode, or every number of threads."""

    mode: Mode | None
    threads: int | None
    reason: str

    def __str__(self) -> str:
        threads = "" if self.threads is None else f" on {self.threads} threads"
        return f"{self.mode or 'all'}{threads}: {self.reason}"


@dataclass(frozen=True)
class Measurement:
    """A benchmark of one bundle on one machine. The first of ``sessions`` and ``activities`` stands for the whole.

    ``failed``: modes that have no rows; ``device``: keys that only a program on the device fills.
    """

    model: dict[str, Any]
    machine: dict[str, Any]
    repetitions: int
    rows: tuple[Row, ...]
    sessions: tuple[SessionCost, ...]
    activities: tuple[ModeActivity, ...]
    failed: tuple[Failure, ...] = ()
    device: Mapping[str, Any] = field(default_factory=dict)

    @property
    def headline(self) -> SessionCost:
        """The session whose figures stand for the bundle: the first mode, on the most threads."""
        first = self.sessions[0].mode
        return max((cost for cost in self.sessions if cost.mode == first), key=lambda cost: cost.threads)

    def to_dict(self) -> dict[str, Any]:
        """Plain values: the promised keys first, then all of it."""
        cost, activity = self.headline, self.activities[0]
        return {
            "rows": [asdict(row) for row in self.rows],
            "ttft_ms": cost.ttft_ms,
            "load_ms": cost.load_ms,
            "peak_rss_bytes": cost.peak_rss_bytes,
            "bytes_per_token": activity.bytes_per_token,
            "density": dict(activity.density),
            "variants": cost.variants,
            "model": dict(self.model),
            "machine": dict(self.machine),
            "repetitions": self.repetitions,
            "sessions": [asdict(cost) for cost in self.sessions],
            "activities": [asdict(activity) for activity in self.activities],
            "failed": [asdict(failure) for failure in self.failed],
            **self.device,
        }


def nothing_measured(model: str, machine: Mapping[str, Any], reason: str) -> dict[str, Any]:
    """The report of a machine on which nothing could be measured: a merged report marks it as failed."""
    failure = Failure(mode=None, threads=None, reason=reason)
    return {"rows": [], "model": {"name": model}, "machine": dict(machine), "failed": [asdict(failure)]}
