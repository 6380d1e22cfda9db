"""Groups of 32 threads that have worked on the same outputs: their sums added up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from qsparse_export.runtimes.tvm.gpu.workgroup import THREADS, assign, barrier, shared, variable, when

LANES = 32
GROUPS = THREADS // LANES


@dataclass(frozen=True)
class Place:
    """Whose sum it was: of a lane the variable ``number``."""

    lane: tirx.Expr
    number: tirx.Expr


def add_groups(
    sums: tirx.Buffer, count: int, dtype: str, group: tirx.Expr, lane: tirx.Expr, thread: tirx.Expr
) -> Iterator[tuple[Place, tirx.Expr]]:
    """Each thread has ``count`` variables; yields, once or more, one of the LANES * count totals for this thread.

    The upper half of the groups hands its sums to the lower half first: half the shared memory. Sums are added in the
    same order every time. Yields inside a condition where the totals are fewer than the threads: no barriers there.
    """
    half = GROUPS // 2
    slots = shared((half, count, LANES), dtype)

    def bank(lane_of: tirx.Expr, number: tirx.Expr | int) -> tirx.Expr:
        """Turned by the variable, so that threads that read along the variables hit other banks. (TVM compacts arrays, and
        would take away the usual lane more.)
        """
        return (lane_of + number) % LANES

    with when(group >= half):
        for i in range(count):
            assign(slots, sums[i], group - half, i, bank(lane, i))
    barrier()
    with when(group < half):
        for i in range(count):
            assign(sums, sums[i] + slots[group, i, bank(lane, i)], i)
    barrier()  # TVM does not see that a thread only reads the slots that it writes next
    with when(group < half):
        for i in range(count):
            assign(slots, sums[i], group, i, bank(lane, i))
    barrier()
    totals = LANES * count
    for begin in range(0, totals, THREADS):
        with when(thread < totals - begin):
            place = T.bind(thread + begin)
            lane_of, number = T.bind(place // count), T.bind(place % count)
            total = variable(dtype, 0)
            for of in range(half):
                assign(total, total[0] + slots[of, number, bank(lane_of, number)])
            yield Place(lane_of, number), total[0]
