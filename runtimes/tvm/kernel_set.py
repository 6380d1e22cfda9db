"""The contract of a set of kernels: what an op becomes on a kind of device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

from tvm import relax

Result: TypeAlias = Any
"""A relax.TensorType: that of a new tensor; or an int: the number of the argument that is written in place."""


class KernelSet(Protocol):
    """Kernels of our ops on rows, for one device. Those of an import are made once each."""

    def call(
        self,
        builder: relax.BlockBuilder,
        name: str,
        arguments: list[Any],
        static: dict[str, Any],
        results: Sequence[Result],
    ) -> list[Any]:
        """Emits the kernel ``name`` made for ``static`` values, called with ``arguments``; a variable for each result.

        Names, their arguments and static values are those of the functions in :mod:`~qsparse_export.runtimes.tvm.kernels`.
        """
        ...
