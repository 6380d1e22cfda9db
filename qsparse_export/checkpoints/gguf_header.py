"""The header of a GGUF file: metadata and tensor descriptions, every count and length checked against the file's size.

Layout (version 2 and 3, little end first): magic, version u32, tensor count u64, metadata count u64, metadata
(key, type, value), tensor infos (name, dims, type, offset), padding to ``general.alignment``, data. Source: ggml
``docs/gguf.md``. The reader of the ``gguf`` package trusts lengths in the file, so only its tables are used.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qsparse_export.errors import CheckpointError

_MAGIC = b"GGUF"
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9
_MOST_DIMS = 4
_MOST_ITEMS = 1 << 24


@dataclass(frozen=True)
class GgufTensor:
    """``shape`` row-major as in PyTorch ([N, K]), ``kind`` the ggml type's name, ``offset`` in bytes from the start."""

    shape: tuple[int, ...]
    kind: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """Metadata values (int, float, bool, str, list of str, numpy array) and tensors by name."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]


def read_gguf_header(path: Path) -> GgufHeader:
    """Raises CheckpointError when the file is no GGUF, of another version or byte order, truncated or inconsistent."""
    size = path.stat().st_size
    if size < 24:
        raise CheckpointError(f"{path} has {size} bytes, less than any GGUF header: copy or download it again")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(path, data, 0)
        if cursor.take(4) != _MAGIC:
            raise CheckpointError(f"{path} is not a GGUF file: it does not begin with {_MAGIC.decode()}")
        version = cursor.integer("<I")
        if version not in (2, 3):
            swapped = " (or big-endian)" if version & 0xFFFF == 0 else ""
            raise CheckpointError(f"{path} is GGUF version {version}{swapped}; expected 2 or 3, little-endian")
        tensor_count, value_count = cursor.count(24), cursor.count(13)
        metadata: dict[str, Any] = {}
        for _ in range(value_count):
            key = cursor.text()
            if key in metadata:
                cursor.fail(f"the metadata key {key!r} occurs twice")
            metadata[key] = cursor.value(cursor.integer("<I"))
        described = [_tensor_info(cursor) for _ in range(tensor_count)]
        start = _data_start(cursor, metadata)
    tensors: dict[str, GgufTensor] = {}
    for name, tensor in described:
        if name in tensors:
            cursor.fail(f"the tensor {name!r} occurs twice")
        offset = start + tensor.offset
        if offset + tensor.nbytes > size:
            raise CheckpointError(
                f"{path}: the tensor {name} needs the bytes up to {offset + tensor.nbytes} and the file has {size}: "
                "it is truncated, copy or download it again"
            )
        tensors[name] = GgufTensor(tensor.shape, tensor.kind, offset, tensor.nbytes)
    return GgufHeader(path, metadata, tensors)


def _tensor_info(cursor: _Cursor) -> tuple[str, GgufTensor]:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    name = cursor.text()
    dims = cursor.integer("<I")
    if not 0 < dims <= _MOST_DIMS:
        cursor.fail(f"the tensor {name!r} has {dims} dimensions; expected 1 to {_MOST_DIMS}")
    shape = tuple(reversed([cursor.integer("<Q") for _ in range(dims)]))
    code, offset = cursor.integer("<I"), cursor.integer("<Q")
    try:
        kind = GGMLQuantizationType(code)
    except ValueError:
        cursor.fail(f"the tensor {name!r} has the unknown type {code}")
    block, block_bytes = GGML_QUANT_SIZES[kind]
    elements = 1
    for dim in shape:
        elements *= dim
    if elements <= 0 or shape[-1] % block:
        cursor.fail(f"the tensor {name!r} has the shape {list(shape)}; rows of {kind.name} are multiples of {block}")
    return name, GgufTensor(shape, kind.name, offset, elements // block * block_bytes)


def _data_start(cursor: _Cursor, metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        cursor.fail(f"general.alignment is {alignment!r}; expected a power of two")
    return -(-cursor.offset // alignment) * alignment


@dataclass
class _Cursor:
    """A position in the mapped file that never moves past its end."""

    path: Path
    data: mmap.mmap
    offset: int

    def fail(self, what: str) -> Any:
        raise CheckpointError(f"{self.path}: the GGUF header is damaged: {what}; copy or download the file again")

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.offset:
            self.fail(f"it promises {count} bytes at {self.offset}, and the file has {len(self.data)}")
        self.offset += count
        return self.data[self.offset - count : self.offset]

    def integer(self, layout: str) -> int:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def count(self, least_bytes: int) -> int:
        """A u64 count of things that take at least ``least_bytes`` each."""
        value = self.integer("<Q")
        if value > min((len(self.data) - self.offset) // least_bytes, _MOST_ITEMS):
            self.fail(f"it promises {value} items at {self.offset}, more than the file can hold")
        return value

    def text(self) -> str:
        try:
            return self.take(self.integer("<Q")).decode()
        except UnicodeDecodeError as error:
            return self.fail(f"text at {self.offset} is not UTF-8 ({error.reason})")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            item = self.integer("<I")
            if item == _STRING:
                return [self.text() for _ in range(self.count(8))]
            dtype = self._scalar(item)
            return np.frombuffer(self.take(self.count(dtype.itemsize) * dtype.itemsize), dtype)
        dtype = self._scalar(kind)
        return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()

    def _scalar(self, kind: int) -> np.dtype[Any]:
        if kind not in _SCALARS:
            self.fail(f"unknown value type {kind} at {self.offset}")
        return np.dtype(_SCALARS[kind])
