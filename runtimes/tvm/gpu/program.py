"""What an op is made of on a GPU: kernels that run one after the other."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx


@dataclass(frozen=True)
class Program:
    """Kernels of one call, in order. A parameter of one name is the same tensor in all of them.

    ``inputs`` and ``outputs`` name the tensors of the caller, in the order of the op. All others are scratch: the caller
    provides them too, uninitialised, of the shape and dtype that the kernels declare. The rows m are symbolic, and a
    program must not be run on 0 rows: then there is nothing to compute, and a grid of 0 blocks is an error to a driver.
    """

    kernels: tuple[tirx.PrimFunc, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def buffers(self) -> dict[str, tirx.Buffer]:
        """Every tensor by name: its shape (m is the only variable) and dtype."""
        return {buffer.name: buffer for kernel in self.kernels for buffer in kernel.params}

    def scratch(self) -> dict[str, tirx.Buffer]:
        """What is handed from one kernel to the next."""
        callers = {*self.inputs, *self.outputs}
        return {name: buffer for name, buffer in self.buffers().items() if name not in callers}

    def shapes(self, m: int) -> dict[str, tuple[int, ...]]:
        """Of every tensor, for ``m`` rows."""
        return {
            name: tuple(m if isinstance(size, tirx.Var) else int(size) for size in buffer.shape)
            for name, buffer in self.buffers().items()
        }
