"""What the threads of a block compute together, in the part of TVM's language that CUDA, OpenCL and WebGPU share.

Reductions and scans go through shared memory and barriers: no warp exchanges, no atomics. Barriers stand in uniform
control flow only, which WebGPU demands. ``blockIdx.z`` is not used: TVM's WebGPU code needs it for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

THREADS = 256
"""Of a block: the most that every WebGPU device has."""
SHARED_BYTES = 16 << 10
"""Of a block, at most: what every WebGPU device has."""


def kernel(name: str, body: Callable[[], None]) -> tirx.PrimFunc:
    """The function that ``body`` writes with TVM's builder; ``name`` must be the module's only one."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        body()
    return builder.get()


@contextmanager
def threads(blocks_x: tirx.Expr | int, blocks_y: int = 1) -> Iterator[tuple[tirx.Var, tirx.Var, tirx.Var]]:
    """Blocks of THREADS threads: (blockIdx.x, blockIdx.y, threadIdx.x)."""
    with (
        T.launch_thread("blockIdx.x", blocks_x) as x,
        T.launch_thread("blockIdx.y", blocks_y) as y,
        T.launch_thread("threadIdx.x", THREADS) as thread,
    ):
        yield x, y, thread


@contextmanager
def when(condition: tirx.Expr) -> Iterator[None]:
    """Statements that only run where ``condition`` holds; no barriers inside."""
    with T.If(condition), T.Then():
        yield


def barrier() -> None:
    """All threads of the block have come here, and what they wrote to shared memory can be read."""
    T.evaluate(T.tvm_storage_sync("shared"))


def shared(shape: tuple[int, ...], dtype: str) -> tirx.Buffer:
    """Memory of the block, not initialised."""
    return T.alloc_buffer(shape, dtype, scope="shared")


def local(count: int, dtype: str, value: int | float | tirx.Expr) -> tirx.Buffer:
    """``count`` variables of a thread, all of one ``value`` at first."""
    variables = T.alloc_buffer((count,), dtype, scope="local")
    for i in range(count):
        T.buffer_store(variables, _as(dtype, value), [i])
    return variables


def variable(dtype: str, value: int | float | tirx.Expr) -> tirx.Buffer:
    """One variable of a thread."""
    return local(1, dtype, value)


def _as(dtype: str, value: int | float | tirx.Expr) -> tirx.Expr:
    return tirx.const(value, dtype) if isinstance(value, int | float) else value


def assign(target: tirx.Buffer, value: tirx.Expr | int | float, *indices: tirx.Expr | int) -> None:
    """``target[indices] = value``; without indices, of a variable."""
    T.buffer_store(target, _as(str(target.dtype), value), list(indices) or [0])


def added(values: Sequence[tirx.Expr]) -> tirx.Expr:
    """The sum of one value or more, in order."""
    total, *rest = values
    for value in rest:
        total = total + value
    return total


def reduced(
    value: tirx.Expr,
    dtype: str,
    thread: tirx.Var,
    combine: Callable[[tirx.Expr, tirx.Expr], tirx.Expr],
) -> tirx.Var:
    """``combine`` over the values of all threads, in the same order every time; every thread gets it. Ends with a barrier."""
    slots = shared((THREADS,), dtype)
    assign(slots, value, thread)
    barrier()
    distance = THREADS // 2
    while distance:
        with when(thread < distance):
            assign(slots, combine(slots[thread], slots[thread + distance]), thread)
        barrier()
        distance //= 2
    result = T.bind(slots[0])
    barrier()
    return result


def sums_before(value: tirx.Expr, thread: tirx.Var) -> tuple[tirx.Var, tirx.Var]:
    """int32: the sum over the threads before this one, and over all. Ends with a barrier."""
    slots = shared((2, THREADS), "int32")
    own = T.bind(value)
    assign(slots, own, 0, thread)
    barrier()
    distance, current = 1, 0
    while distance < THREADS:
        earlier = T.Select(thread >= distance, slots[current, T.max(thread - distance, 0)], T.int32(0))
        assign(slots, slots[current, thread] + earlier, 1 - current, thread)
        barrier()
        distance, current = 2 * distance, 1 - current
    before, total = T.bind(slots[current, thread] - own), T.bind(slots[current, THREADS - 1])
    barrier()
    return before, total


def ceil_div(value: tirx.Expr | int, divisor: int) -> tirx.Expr | int:
    """Of values that are not negative."""
    return (value + (divisor - 1)) // divisor
