"""Inputs for a graph that comes without any: made up from the types, shapes and names of its inputs, or read from a file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qsparse_export.errors import UsageError

if TYPE_CHECKING:
    import onnx_ir as ir

_SIZES = (3, 5, 7, 4, 6, 8)  # of the symbolic dimensions after the first: distinct as long as possible
_UNKNOWN = 2
_GIVE = "give the inputs with --inputs FILE.npz (example_inputs= in Python), or export with --verify none"


def read_inputs(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file by name; UsageError when it is none. Objects in it are never unpickled."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # numpy raises OSError, ValueError and zipfile's own
        raise UsageError(f"cannot read inputs from {path} ({error}); expected a file of numpy.savez") from error


def example_feeds(graph: ir.Graph, given: Mapping[str, np.ndarray] | None, batch: int = 2) -> dict[str, np.ndarray]:
    """Every input of ``graph``: from ``given``, or made up.

    The first symbolic dimension is ``batch``, the others get distinct small sizes (sums such as ``past + sequence`` add
    up); floats are normal, masks and
    booleans one, positions count up, ids are below the rows of the table that they pick from, other integers 0 or 1.
    Raises UsageError for a name or type in ``given`` that the graph does not have, and for inputs that are no numbers.
    """
    wanted = {str(value.name): value for value in graph.inputs if value.name not in graph.initializers}
    if unknown := sorted(set(given or ()) - wanted.keys()):
        raise UsageError(f"the model has no input {', '.join(unknown)}; its inputs are {', '.join(wanted)}")
    sizes = _Sizes(batch)
    random = np.random.default_rng(0)
    feeds = {}
    for name, value in wanted.items():
        if given is not None and name in given:
            feeds[name] = _checked(value, given[name])
        else:
            feeds[name] = _made_up(value, tuple(_size(dim, sizes) for dim in _dims(value)), random)
    return feeds


def _dims(value: ir.Value) -> list[int | str | None]:
    if value.shape is None:
        raise UsageError(f"the input {value.name} has no shape; {_GIVE}")
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape.dims]


class _Sizes(dict[str, int]):
    """Sizes of the symbolic dimensions so far."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self._sizes = (first, *_SIZES)

    def new(self) -> int:
        return self._sizes[len(self) % len(self._sizes)]


def _size(dim: int | str | None, sizes: _Sizes) -> int:
    if isinstance(dim, int) or dim is None:
        return _UNKNOWN if dim is None else dim
    terms = re.split(r"\s*\+\s*", dim)
    if len(terms) > 1:
        return sum(int(term) if term.isdigit() else _size(term, sizes) for term in terms)
    if dim not in sizes:
        # attention masks cover past and present: exporters name that length "total", "past_sequence_length + 1", ...
        total = [size for name, size in sizes.items() if re.search("past|seq", name)] if "total" in dim else []
        sizes[dim] = sum(total) or sizes.new()
    return sizes[dim]


def _checked(value: ir.Value, array: np.ndarray) -> np.ndarray:
    dtype = value.dtype.numpy() if value.dtype is not None else array.dtype
    if array.dtype != dtype:
        raise UsageError(f"the input {value.name} is {dtype}, and {array.dtype} was given")
    return array


def _made_up(value: ir.Value, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    name = str(value.name)
    try:
        dtype = value.dtype.numpy() if value.dtype is not None else np.dtype(object)
    except TypeError:
        dtype = np.dtype(object)
    if np.issubdtype(dtype, np.floating):
        return random.normal(size=shape).astype(dtype)
    if dtype == np.bool_ or (np.issubdtype(dtype, np.integer) and "mask" in name):
        return np.ones(shape, dtype)
    if np.issubdtype(dtype, np.integer):
        if "position" in name and shape:
            return np.broadcast_to(np.arange(shape[-1], dtype=dtype), shape).copy()
        return random.integers(0, _rows(value), shape).astype(dtype)
    raise UsageError(f"no example can be made up for the input {name} of type {value.dtype}; {_GIVE}")


def _rows(value: ir.Value) -> int:
    """Rows of the smallest table that ``value`` picks rows from; 2 when it picks from none."""
    rows = []
    for use in value.uses():
        node = use.node
        table = node.inputs[0] if node.op_type == "Gather" and use.idx == 1 else None
        if table is None or table.shape is None or not len(table.shape) or node.attributes.get_int("axis", 0) != 0:
            continue
        if isinstance(table.shape[0], int):
            rows.append(table.shape[0])
    return min(rows, default=2)
