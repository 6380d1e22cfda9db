"""A device that is a program on this machine's CPU, and what all of them do alike."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np
from kernel_call import unwritten

from qsparse_export.runtimes.tvm.gpu.program import Program


class SoftwareDevice(Protocol):
    """Runs the kernels of a program in order, with work-groups and barriers."""

    def run(self, program: Program, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All tensors of the program by name, scratch too, after it has run."""


def sizes_of(program: Program, inputs: dict[str, np.ndarray]) -> dict[str, int]:
    """The program's sizes that its inputs tell: the rows m among them."""
    return program.sizes({name: array.shape for name, array in inputs.items()})


def tensors_before(program: Program, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of the program: those that are given, checked, and the others with garbage in them."""
    assert set(inputs) == set(program.inputs)
    shapes, tensors = program.shapes(sizes_of(program, inputs)), {}
    for name, buffer in program.buffers().items():
        dtype = np.dtype(str(buffer.dtype))
        tensors[name] = np.ascontiguousarray(inputs[name]) if name in inputs else unwritten(shapes[name], dtype)
        assert (tensors[name].shape, tensors[name].dtype) == (shapes[name], dtype), name
    return tensors


def missing(what: str, problem: object, remedies: Iterable[str]) -> str:
    """Why a test cannot run here, and what to install."""
    return f"{what} is missing ({problem}), which this needs: {'; '.join(remedies)}"
