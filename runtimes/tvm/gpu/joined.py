"""Matrices side by side, each padded to whole tiles of outputs: which of them an output belongs to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from qsparse_export.errors import UsageError
from qsparse_export.runtimes.tvm.gpu.workgroup import THREADS, assign, threads, variable, when


@dataclass(frozen=True)
class Matrix:
    """One with outputs. Outputs count along y, which has no padding, columns along the weights, which have."""

    number: int
    first_output: int
    first_column: int
    outputs: int


@dataclass(frozen=True)
class Joined:
    """``columns`` and ``outputs`` of all; a matrix without outputs has no place in them."""

    matrices: tuple[Matrix, ...]
    columns: int
    outputs: int
    count: int

    def number_of(self, output: tirx.Expr) -> tirx.Expr:
        """int32: the matrix that an output belongs to."""
        return self._choose(output, [matrix.number for matrix in self.matrices])

    def column_of(self, output: tirx.Expr) -> tirx.Expr:
        """int32: where the weights have an output."""
        return output + self._choose(output, [matrix.first_column - matrix.first_output for matrix in self.matrices])

    def _choose(self, output: tirx.Expr, values: list[int]) -> tirx.Expr:
        chosen: tirx.Expr = T.int32(values[0])
        for matrix, value in zip(self.matrices[1:], values[1:], strict=True):
            chosen = T.Select(output >= matrix.first_output, T.int32(value), chosen)
        return chosen


def join(n: Sequence[int], tile: int) -> Joined:
    """Matrices of ``n`` outputs, padded to multiples of ``tile``. UsageError where none has an output."""
    matrices, column, output = [], 0, 0
    for number, outputs in enumerate(n):
        if outputs < 0:
            raise UsageError(f"a matrix has {outputs} outputs; expected 0 or more")
        if outputs:
            matrices.append(Matrix(number, output, column, outputs))
        column += -(-outputs // tile) * tile
        output += outputs
    if not matrices:
        raise UsageError(f"the matrices have {list(n)} outputs; expected at least one: there is no kernel for nothing")
    return Joined(tuple(matrices), column, output, len(n))


@contextmanager
def each_output(
    joined: Joined, m: tirx.Expr, slices: int, sums: tirx.Expr, dtype: str
) -> Iterator[tuple[tirx.Expr, tirx.Expr, tirx.Expr]]:
    """A thread for each of ``m`` rows and each output: (row, output, the sum of its ``slices`` in ``sums``, of ``dtype``)."""
    with threads(m, -(-joined.outputs // THREADS)) as (row, tile, thread):
        output = T.bind(tile * THREADS + thread)
        with when(output < joined.outputs):
            column = T.bind(joined.column_of(output))
            total = variable(dtype, 0)
            with T.serial(0, slices) as slice_:
                assign(total, total[0] + sums[row, slice_, column])
            yield row, output, total[0]
