"""What a whole-model benchmark is to measure."""

from __future__ import annotations

from dataclasses import dataclass

from qsparse_export.bench.measurement import Mode
from qsparse_export.errors import UsageError

ACTIVITY_TOKENS = 32
"""Generated tokens that density is measured over where no test generates any."""


@dataclass(frozen=True)
class Plan:
    """Prefills of ``prompts`` tokens and generations of ``generations`` tokens, in every mode.

    Each is repeated ``repetitions`` times after one run that does not count, on each number of ``threads``.
    """

    prompts: tuple[int, ...]
    generations: tuple[int, ...]
    repetitions: int
    threads: tuple[int, ...]
    modes: tuple[Mode, ...]

    @property
    def tests(self) -> tuple[tuple[str, int], ...]:
        """Names and tokens, in llama-bench's spelling."""
        return (*((f"pp{n}", n) for n in self.prompts), *((f"tg{n}", n) for n in self.generations))

    @property
    def activity_tokens(self) -> int:
        """Tokens that density is measured over."""
        return max(self.generations, default=ACTIVITY_TOKENS)

    @property
    def steps(self) -> int:
        """Calls of ``on_step`` while it is carried out: tokens of the density, and runs of each test."""
        graphs = len({mode == "dense" for mode in self.modes})
        runs = len(self.tests) * len(self.modes) * len(self.threads) * (self.repetitions + 1)
        return graphs * self.activity_tokens + runs


def check(plan: Plan, positions: int) -> None:
    """UsageError when the plan asks for nothing, or for more tokens than the ``positions`` that the model has."""
    if not plan.tests:
        raise UsageError("nothing to measure: -p 0 and -n 0; give a number of tokens to one of them, such as -n 128")
    if plan.repetitions < 1 or min(plan.threads, default=0) < 1:
        raise UsageError(
            f"{plan.repetitions} repetitions on {list(plan.threads)} threads; expected 1 or more of each (-r, -t)"
        )
    for flag, counts in (("-p", plan.prompts), ("-n", plan.generations)):
        for tokens in counts:
            if not 0 < tokens <= positions:
                raise UsageError(f"{flag} {tokens}: the model has {positions} positions; expected 1 to {positions}")
