"""What an op is made of on a GPU: kernels that run one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tvm import tirx

from qsparse_export.errors import UsageError

Size = TypeVar("Size")
"""A number, or what a compiler has in its place."""
DTYPES = ("float32", "float16")
LARGEST_K_IN = 2_000_000
"""So that sums of 128 * 2 per channel fit into int32, and a count of the channels of 8 threads of 256 into 16 bits."""
SLICE_CHANNELS = 512
"""At least; fewer would not pay for a slice's sums."""
MOST_SLICES = 128
"""So that the listed channels times slices times 8 groups of threads fit into int32."""


@dataclass(frozen=True)
class Program:
    """Kernels of one call, in order. A parameter of one name is the same tensor in all of them.

    ``inputs`` and ``outputs`` name the tensors of the caller, in the order of the op. All others are scratch: the caller
    provides them too, uninitialised, of the shape and dtype that the kernels declare. A kernel's inputs come before what it
    writes. ``in_place`` are inputs that the first kernel which has them writes, and results too. The rows m are symbolic
    (of attention, other lengths too), and a program must not be run on 0 rows: then there is nothing to compute, and a grid
    of 0 blocks is an error to a driver.
    """

    kernels: tuple[tirx.PrimFunc, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    in_place: tuple[str, ...] = ()

    def buffers(self) -> dict[str, tirx.Buffer]:
        """Every tensor by name: its shape and dtype."""
        return {buffer.name: buffer for kernel in self.kernels for buffer in kernel.params}

    def sizes(self, shapes: Mapping[str, Sequence[Size]]) -> dict[str, Size]:
        """What the variables of the kernels are (``m`` the rows), by the shapes of the inputs."""
        return {
            size.name: given
            for name, buffer in self.buffers().items()
            if name in shapes
            for size, given in zip(buffer.shape, shapes[name], strict=True)
            if isinstance(size, tirx.Var)
        }

    def shapes(self, sizes: Mapping[str, Size]) -> dict[str, tuple[Size | int, ...]]:
        """Of every tensor, for such ``sizes``."""
        return {
            name: tuple(sizes[size.name] if isinstance(size, tirx.Var) else int(size) for size in buffer.shape)
            for name, buffer in self.buffers().items()
        }


def check_sizes(k_in: int, dtype: str) -> None:
    """UsageError for what no kernel is made for."""
    if dtype not in DTYPES:
        raise UsageError(f"activations are {dtype}; a GPU kernel takes {' or '.join(DTYPES)}")
    if not 0 < k_in <= LARGEST_K_IN:
        raise UsageError(f"there are {k_in} inputs; a GPU kernel takes 1 to {LARGEST_K_IN}")


def slices_of(k_in: int, wanted: int | None) -> int:
    """Into how many slices the active channels of a row are cut; None: as many as leave each SLICE_CHANNELS channels.

    UsageError outside of 1 to MOST_SLICES.
    """
    slices = min(-(-k_in // SLICE_CHANNELS), MOST_SLICES) if wanted is None else wanted
    if not 0 < slices <= MOST_SLICES:
        raise UsageError(f"a product is cut into {slices} slices; expected 1 to {MOST_SLICES}")
    return slices
