"""A ``model.onnx`` that another exporter wrote: checked as a stranger's file before anything of it is believed."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from qsparse_export.checkpoints.folder import trusted_roots
from qsparse_export.checkpoints.model import Model, OnnxFile, model_name
from qsparse_export.errors import CheckpointError
from qsparse_export.weights import StateDict

if TYPE_CHECKING:
    import onnx

OLDEST_OPSET, NEWEST_OPSET = 17, 25
DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft", "ai.qsparse"})
_MOST_BYTES = (1 << 31) - 1  # of one protobuf message
_VARINT, _BYTES = 0, 2
# Field numbers of ModelProto and how each is encoded.
_FIELDS = {1: _VARINT, 5: _VARINT} | dict.fromkeys((2, 3, 4, 6, 7, 8, 14, 20, 25, 26), _BYTES)
_GRAPH = 7


def looks_like_onnx(start: bytes) -> bool:
    """Whether a file beginning with ``start`` may be an ONNX model: ir_version first, as every writer puts it."""
    return len(start) > 3 and start[0] == 0x08 and 0 < start[1] < 0x40 and _FIELDS.get(start[2] >> 3) == start[2] & 7


def read_onnx(path: Path) -> Model:
    """Raises CheckpointError when the file is truncated, invalid, needs ops that nobody knows, or refers to data elsewhere."""
    _check_fields(path)
    try:
        import onnx

        proto = onnx.load_model(path, load_external_data=False)
    except (
        Exception
    ) as error:  # protobuf's DecodeError, which onnx does not re-export, and whatever else a damaged file gives
        raise CheckpointError(f"{path} is a damaged ONNX file ({error}): copy or export it again") from error
    _check_opsets(path, proto)
    _check_inputs(path, proto)
    external = _check_tensors(path, proto)
    _check_functions(path, proto)
    try:
        from qsparse_export import ops

        ops.register()
        onnx.checker.check_model(str(path))
    except Exception as error:  # ValidationError, and errors of its C++ side that have no Python class
        raise CheckpointError(f"{path} is not valid ONNX ({_first_line(error)}): export it again") from error
    files = (path, *sorted(external))
    return Model(model_name(path), None, StateDict({}), None, "onnx", files, onnx=OnnxFile(path))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _check_fields(path: Path) -> None:
    """Walks over the outermost fields by their lengths, so that a cut or forged file is found before it is decoded."""
    size = path.stat().st_size
    if size > _MOST_BYTES:
        raise CheckpointError(
            f"{path} has {size} bytes; a protobuf message has less than 2 GiB: save the weights as external data"
        )
    seen = set()
    with path.open("rb") as file:
        while file.tell() < size:
            at = file.tell()
            tag = _varint(file, path)
            number, kind = tag >> 3, tag & 7
            if _FIELDS.get(number) != kind:
                raise CheckpointError(f"{path} is not an ONNX model: field {number} of kind {kind} at byte {at}")
            seen.add(number)
            if kind == _VARINT:
                _varint(file, path)
                continue
            length = _varint(file, path)
            if length > size - file.tell():
                raise CheckpointError(
                    f"{path} is truncated: the field at byte {at} has {length} bytes and the file ends after "
                    f"{size - file.tell()}; copy or download it again"
                )
            file.seek(length, os.SEEK_CUR)
    if _GRAPH not in seen:
        raise CheckpointError(f"{path} is an ONNX file without a graph; expected a model")


def _varint(file: Any, path: Path) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            raise CheckpointError(f"{path} is truncated at its end; copy or download it again")
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise CheckpointError(f"{path} is not an ONNX model: a number in it is longer than 64 bits")


def _check_opsets(path: Path, proto: onnx.ModelProto) -> None:
    versions = {entry.domain or "": entry.version for entry in proto.opset_import}
    version = versions.get("", versions.get("ai.onnx"))
    if version is None or not OLDEST_OPSET <= version <= NEWEST_OPSET:
        raise CheckpointError(
            f"{path} has opset {version}; expected {OLDEST_OPSET} to {NEWEST_OPSET}: export it again with opset_version=23"
        )
    local = {(function.domain, function.name) for function in proto.functions}
    for node in _nodes(proto):
        if node.domain not in DOMAINS and (node.domain, node.op_type) not in local:
            raise CheckpointError(
                f"{path} uses {node.domain}::{node.op_type}, which no function in the file defines. A custom-op library, by "
                "whoever it is named, is never loaded: export the model with standard ops, or with the op as a function"
            )


def _check_inputs(path: Path, proto: onnx.ModelProto) -> None:
    if not proto.graph.output:
        raise CheckpointError(f"{path} has no output; expected a model that computes something")
    for value in (*proto.graph.input, *proto.graph.output):
        if value.type.WhichOneof("value") not in ("tensor_type", None):
            raise CheckpointError(f"{path}: {value.name} is no tensor; expected tensors as inputs and outputs")


def _check_functions(path: Path, proto: onnx.ModelProto) -> None:
    """Refuses functions that call themselves, and functions that take the name of an op of ours for something else."""
    from qsparse_export import ops

    calls = {(f.domain, f.name): {(node.domain, node.op_type) for node in f.node} for f in proto.functions}
    done: set[tuple[str, str]] = set()
    while ready := [name for name, called in calls.items() if name not in done and not (called & calls.keys()) - done]:
        done.update(ready)
    if len(done) < len(calls):
        names = ", ".join(f"{domain}::{name}" for domain, name in sorted(calls.keys() - done))
        raise CheckpointError(f"{path}: the functions {names} call themselves; expected functions that end")
    for function in proto.functions:
        if function.domain != ops.DOMAIN:
            continue
        if function.name not in ops.OPS or list(function.node) != _body(function.name):
            raise CheckpointError(
                f"{path}: the function {ops.DOMAIN}::{function.name} is not this project's; remove it or rename its domain"
            )


def _body(name: str) -> list[onnx.NodeProto]:
    import onnx_ir

    from qsparse_export import ops

    return list(onnx_ir.to_proto(ops.op(name).body()).node)


def _nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    stack: list[Any] = [proto.graph, *proto.functions]
    while stack:
        for node in stack.pop().node:
            yield node
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    stack.append(attribute.g)
                stack.extend(attribute.graphs)


@dataclass(frozen=True)
class _Stored:
    """Where one tensor's bytes lie in an external file."""

    location: str
    offset: int
    length: int | None


def _check_tensors(path: Path, proto: onnx.ModelProto) -> set[Path]:
    """Checks the size of every tensor; returns the external files, all regular ones inside the folder of the model."""
    import onnx

    files: set[Path] = set()
    for tensor in _tensors(proto):
        wanted = _bytes_of(path, tensor)
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            stored = _stored(path, tensor)
            file = _member(path, tensor.name, stored.location)
            held = file.stat().st_size - stored.offset
            if (
                wanted is None
                or stored.offset < 0
                or wanted > min(held, held if stored.length is None else stored.length)
            ):
                raise CheckpointError(
                    f"{path}: {tensor.name} takes {wanted} bytes at {stored.offset} of {stored.location}, which has "
                    f"{held + stored.offset}; the files do not belong together or are truncated: copy them again"
                )
            files.add(file)
        elif tensor.HasField("raw_data"):
            if wanted != len(tensor.raw_data):
                raise CheckpointError(
                    f"{path}: {tensor.name} holds {len(tensor.raw_data)} bytes, its shape and type take {wanted}: export it again"
                )
        else:
            try:
                onnx.numpy_helper.to_array(tensor)
            except Exception as error:  # ValueError and TypeError, whatever the fields lack
                raise CheckpointError(
                    f"{path}: the tensor {tensor.name} is damaged ({error}): export it again"
                ) from error
    return files


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    stack: list[Any] = [proto.graph]
    while stack:
        graph = stack.pop()
        yield from graph.initializer
        stack.extend(a.g for node in graph.node for a in node.attribute if a.HasField("g"))
        stack.extend(g for node in graph.node for a in node.attribute for g in a.graphs)
    for node in _nodes(proto):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors


def _bytes_of(path: Path, tensor: onnx.TensorProto) -> int | None:
    """Bytes that the elements take when stored raw; None for a type without a fixed size."""
    import onnx_ir

    elements = 1
    for dim in tensor.dims:
        if dim < 0:
            raise CheckpointError(
                f"{path}: {tensor.name} has the shape {list(tensor.dims)}; expected sizes of 0 or more"
            )
        elements *= dim
    try:
        bits = onnx_ir.DataType(tensor.data_type).bitwidth
    except (ValueError, TypeError):
        return None
    return -(-elements * bits // 8)


def _stored(path: Path, tensor: onnx.TensorProto) -> _Stored:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    try:
        length = int(entries["length"]) if "length" in entries else None
        return _Stored(entries["location"], int(entries.get("offset", "0")), length)
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path}: {tensor.name} does not say where its data lies ({error}): export it again"
        ) from error


def _member(path: Path, name: str, location: str) -> Path:
    """The regular file ``location`` beside the model; CheckpointError for anything that leads out of its folder."""
    parts = PurePosixPath(location).parts
    if not location or location.startswith("/") or {"..", "."} & set(parts) or {"\\", "\0", ":"} & set(location):
        raise CheckpointError(
            f"{path}: {name} refers to data at {location!r}, outside the model's folder; expected a file beside the model"
        )
    file = path.parent / location
    try:
        status, resolved = file.stat(), file.resolve(strict=True)
    except OSError as error:
        raise CheckpointError(
            f"{path}: the data of {name} in {location} cannot be opened ({error.strerror}): copy it beside the model"
        ) from error
    if not any(resolved.is_relative_to(root) for root in trusted_roots(path.parent)):
        raise CheckpointError(f"{path}: {location} is a link to {resolved}, outside the folder; copy the file itself")
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: {location} is not a regular file; expected a file with data")
    return file
