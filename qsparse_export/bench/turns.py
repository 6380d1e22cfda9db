"""Times several opened models in turn: only one of them runs at any moment, and a drifting machine hits all alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from qsparse_export.bench.measurement import Mode, Row, SessionCost
from qsparse_export.bench.plan import Plan
from qsparse_export.bench.runner import Prefill, Runner


@dataclass
class _Samples:
    """Seconds of one runner: of its first prompt, of each later one's first token, and of every test's repetitions."""

    first_run_s: float | None = None
    first_token_s: list[float] = field(default_factory=list)
    tests_s: dict[str, list[tuple[float, ...]]] = field(default_factory=dict)


def take_turns(
    runners: Mapping[Mode, Runner], plan: Plan, threads: int, on_step: Callable[[str], object]
) -> tuple[list[Row], list[SessionCost]]:
    """Every test of the plan on every runner, again and again; the first round is a warm-up and does not count.

    ``threads`` is what the runners were opened with. Time to the first token is that of the longest prompt.
    """
    samples = {mode: _Samples() for mode in runners}
    for turn in range(plan.repetitions + 1):
        for test, tokens in plan.tests:
            for mode, runner in runners.items():
                on_step(f"{test} {mode} t{threads}")
                _run(runner, test, tokens, samples[mode], plan, counts=turn > 0)
    rows = [
        Row.of(test, mode, threads, tokens, samples[mode].tests_s[test])
        for test, tokens in plan.tests
        for mode in runners
    ]
    return rows, [_cost(runner, mode, threads, samples[mode]) for mode, runner in runners.items()]


def _run(runner: Runner, test: str, tokens: int, samples: _Samples, plan: Plan, *, counts: bool) -> None:
    if test.startswith("tg"):
        seconds = runner.generate(tokens)
    else:
        seconds = _seconds(runner.prefill(tokens), samples, counts=counts and tokens == max(plan.prompts))
    if counts:
        samples.tests_s.setdefault(test, []).append(seconds)


def _seconds(prefill: Prefill, samples: _Samples, *, counts: bool) -> tuple[float, ...]:
    if samples.first_run_s is None:
        samples.first_run_s = prefill.first_token_seconds
    if counts:
        samples.first_token_s.append(prefill.first_token_seconds)
    return (prefill.seconds,)


def _cost(runner: Runner, mode: Mode, threads: int, samples: _Samples) -> SessionCost:
    opened, footprint = runner.opened(), runner.footprint()
    return SessionCost(
        mode=mode,
        threads=threads,
        load_ms=opened.load_ms,
        first_run_ms=None if samples.first_run_s is None else samples.first_run_s * 1e3,
        ttft_ms=float(np.median(samples.first_token_s)) * 1e3 if samples.first_token_s else None,
        peak_rss_bytes=footprint.peak_rss_bytes,
        rss_before_load_bytes=opened.rss_before_load_bytes,
        variants=footprint.native_calls,
    )
