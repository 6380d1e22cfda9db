"""Where a bundle is measured: the contract, and this machine. Over ssh: :mod:`qsparse_export.bench.remote`.

The devices of a TVM RPC tracker: :mod:`qsparse_export.bench.farm`. Another way to reach devices is a class with these three
methods, chosen in ``cli/bench_model.py``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from qsparse_export.bench import model

if TYPE_CHECKING:
    from qsparse_export.bench.measurement import Measurement
    from qsparse_export.bench.plan import Plan
    from qsparse_export.bundle import Bundle


class Device(Protocol):
    """A machine that runs bundles while they are measured."""

    def cores(self) -> int:
        """Cores that a program may use there: the threads of a plan that names none."""
        ...

    def steps(self, bundle: Bundle, plan: Plan) -> int:
        """About how often :meth:`measure` will call ``on_step``."""
        ...

    def measure(self, bundle: Bundle, plan: Plan, on_step: Callable[[str], object]) -> Measurement:
        """Carries out the plan; ``on_step`` is told what runs next. A mode that could not be measured is in ``failed``.

        Raises a :class:`~qsparse_export.errors.QSparseError` when nothing could, and leaves nothing behind on the device.
        """
        ...


@dataclass(frozen=True)
class LocalDevice:
    """The machine that this program runs on."""

    def cores(self) -> int:
        """See :class:`Device`."""
        if hasattr(os, "sched_getaffinity"):
            return len(os.sched_getaffinity(0))
        return os.cpu_count() or 1

    def steps(self, bundle: Bundle, plan: Plan) -> int:
        """See :class:`Device`."""
        return plan.steps

    def measure(self, bundle: Bundle, plan: Plan, on_step: Callable[[str], object]) -> Measurement:
        """See :func:`qsparse_export.bench.model.measure`."""
        return model.measure(bundle, plan, on_step)
