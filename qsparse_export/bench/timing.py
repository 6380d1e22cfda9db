"""Times several contenders in turn, so that a machine that speeds up or slows down does so for all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

LEAST_ROUNDS = 5


@dataclass(frozen=True)
class Contender:
    """Something to time: one call of ``run`` does the measured work ``repeats`` times."""

    run: Callable[[], object]
    repeats: int


@dataclass(frozen=True)
class Timing:
    """Microseconds of one repeat over ``rounds`` calls."""

    min_us: float
    median_us: float
    p90_us: float
    rounds: int


def interleave(contenders: Mapping[str, Contender], seconds: float) -> dict[str, Timing]:
    """Calls every contender in turn, at least ``LEAST_ROUNDS`` times, for about ``seconds`` per contender.

    The first call of each is not counted.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for contender in contenders.values():
        contender.run()
    end = time.perf_counter() + seconds * len(contenders)
    rounds = 0
    while rounds < LEAST_ROUNDS or time.perf_counter() < end:
        for name, contender in contenders.items():
            start = time.perf_counter()
            contender.run()
            samples[name].append((time.perf_counter() - start) / contender.repeats * 1e6)
        rounds += 1
    return {
        name: Timing(min(values), float(np.median(values)), float(np.percentile(values, 90)), rounds)
        for name, values in samples.items()
    }
