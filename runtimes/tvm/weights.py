"""The weights of a graph as TVM tensors, over the mapped file, or over memory that it was read into."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from qsparse_export.errors import BundleError
from qsparse_export.runtimes import switches
from qsparse_export.runtimes.tvm.tensors import aligned_empty, copied, is_aligned, over

_CODE_BITS = {onnx.TensorProto.INT4: 4, onnx.TensorProto.INT8: 8}


@dataclass(frozen=True)
class Weight:
    """A tensor in the weights' file, ``offset_bytes`` from its begin; ``dtype`` is NumPy's name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int

    @property
    def numpy_dtype(self) -> np.dtype:
        """Its type."""
        return np.dtype(self.dtype)

    @property
    def size_bytes(self) -> int:
        """Its length in the file."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.numpy_dtype.itemsize


def weights_of(graph: onnx.GraphProto) -> tuple[Weight, ...]:
    """The initialisers that lie in the external file, in the order of the graph.

    Codes of SparseMatMulNBits become uint8 rows, as they lie in the file: int4 is two codes a byte.
    """
    codes = {node.input[1] for node in graph.node if node.op_type == "SparseMatMulNBits"}
    weights = []
    for tensor in graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        offset = next((int(entry.value) for entry in tensor.external_data if entry.key == "offset"), 0)
        shape = tuple(tensor.dims)
        if tensor.name in codes and tensor.data_type in _CODE_BITS:
            bits = _CODE_BITS[tensor.data_type]
            weights.append(Weight(tensor.name, "uint8", (*shape[:-1], shape[-1] * bits // 8), offset))
        else:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            weights.append(Weight(tensor.name, dtype.name, shape, offset))
    return tuple(weights)


def mapped(weights: tuple[Weight, ...], file: Path) -> list[Any]:
    """A TVM tensor of each weight, over a private mapping of ``file``; BundleError where the file is too short."""
    # Copy-on-write: DLPack has no word for memory that is only read.
    return _tensors(weights, file, np.memmap(file, dtype=np.uint8, mode="c")) if weights else []


def resident(weights: tuple[Weight, ...], file: Path) -> list[Any]:
    """The same over memory that ``file`` was read into, which has huge pages where the system has them.

    As :func:`mapped` where that is switched off, or would leave less than a quarter of the machine's memory available.
    """
    if not weights or not switches.is_on(switches.HUGE_PAGES, otherwise=True) or not _has_room(file.stat().st_size):
        return mapped(weights, file)
    content = aligned_empty(file.stat().st_size)  # NumPy asks for huge pages
    with file.open("rb", buffering=0) as source:
        read = 0
        while count := source.readinto(content.data[read:]):
            read += count
    return _tensors(weights, file, content[:read])


def _has_room(size_bytes: int) -> bool:
    import psutil

    memory = psutil.virtual_memory()
    return memory.available - size_bytes > memory.total // 4


def _tensors(weights: tuple[Weight, ...], file: Path, content: np.ndarray) -> list[Any]:
    tensors = []
    for weight in weights:
        end = weight.offset_bytes + weight.size_bytes
        if end > len(content):
            raise BundleError(
                f"{file} has {len(content)} bytes, and {weight.name} ends at {end}: the file is incomplete or belongs to "
                "another graph; export the bundle again"
            )
        array = content[weight.offset_bytes : end].view(weight.dtype).reshape(weight.shape)
        tensors.append(over(array) if is_aligned(array) else copied(array))
    return tensors
