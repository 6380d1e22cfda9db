"""The measured graphs: many nodes of one op, each with weights of its own, sharing one input, beside an external file.

A graph of a single small matrix would be read from the cache, and identical matrices are read up to 2.6 times too fast:
so each of ``copies`` nodes has random contents of its own. Ours and the peers' graphs differ in the node only, so that
both pay what ONNX Runtime costs per node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qsparse_export.formats import nbits, ternary

if TYPE_CHECKING:
    import onnx

SCALE = 0.02
PIECE_BYTES = 1 << 24
PEER_BLOCK = 128
"""Block size of the peer's scales; with ``accuracy_level`` 4 its fast path."""


@dataclass(frozen=True)
class Graph:
    """A model file with ``copies`` nodes whose outputs Y0.. are [m, n]; ``weight_bytes`` are those of one node.

    ``weights`` is the file that holds the weights, those of node i at ``i * stride``.
    """

    path: Path
    copies: int
    weight_bytes: int
    weights: Path | None = None
    stride: int = 0


@dataclass(frozen=True)
class _Tensor:
    name: str
    onnx_type: int
    shape: tuple[int, ...]
    nbytes: int


def ternary_graph(folder: Path, k: int, n: int, copies: int) -> Graph:
    """TernaryMatMul with random ternary weights (``formats.ternary``) and the scale ``SCALE``."""
    from onnx import TensorProto

    nbytes = k * ternary.row_bytes(n)
    tensor = _Tensor("w", TensorProto.UINT8, (k, ternary.row_bytes(n)), nbytes)
    scale = np.array([SCALE], np.float32)
    stride = -(-nbytes // (2 * ternary.row_bytes(n))) * 2 * ternary.row_bytes(n)  # whole rows, and 64-byte aligned
    _write_weights(folder / "ternary.data", copies * stride, _ternary_bytes)
    path = _save(
        folder / "ternary.onnx", "TernaryMatMul", "ai.qsparse", {"n": n}, k, n, copies, tensor, stride, {"scale": scale}
    )
    return Graph(path, copies, nbytes, folder / "ternary.data", stride)


def sparse_nbits_graph(folder: Path, bits: int, group: int, k: int, n: int, copies: int) -> Graph:
    """SparseMatMulNBits without a selection: random codes (``formats.nbits``, channel-major), every scale ``SCALE``."""
    from onnx import TensorProto

    columns = nbits.columns(n)
    row_bytes = columns * bits // 8
    tensor = _Tensor("w", TensorProto.INT4 if bits == 4 else TensorProto.INT8, (k, columns), k * row_bytes)
    scales = np.full((nbits.group_count(k, group), columns), SCALE, np.float16)
    _write_weights(folder / f"sparse{bits}.data", copies * k * row_bytes, lambda raw: raw)
    attributes = {"k": k, "block": 0, "rescale": "none", "n": [n], "bits": bits, "group": group}
    path = _save(
        folder / f"sparse{bits}.onnx",
        "SparseMatMulNBits",
        "ai.qsparse",
        attributes,
        k,
        n,
        copies,
        tensor,
        k * row_bytes,
        {"scales": scales},
    )
    return Graph(path, copies, k * row_bytes, folder / f"sparse{bits}.data", k * row_bytes)


def dense_nbits_graph(folder: Path, bits: int, group: int, k: int, n: int, copies: int) -> Graph:
    """DenseMatMulNBits: random codes (``formats.nbits``, output-major), every scale ``SCALE``."""
    from onnx import TensorProto

    row_bytes = nbits.output_row_bytes(k, bits)
    tensor = _Tensor("w", TensorProto.UINT8, (n, row_bytes), n * row_bytes)
    scales = np.full((n, nbits.group_count(k, group)), SCALE, np.float16)
    _write_weights(folder / f"dense{bits}.data", copies * n * row_bytes, lambda raw: raw)
    path = _save(
        folder / f"dense{bits}.onnx",
        "DenseMatMulNBits",
        "ai.qsparse",
        {"n": n, "k": k, "bits": bits, "group": group},
        k,
        n,
        copies,
        tensor,
        n * row_bytes,
        {"scales": scales},
    )
    return Graph(path, copies, n * row_bytes, folder / f"dense{bits}.data", n * row_bytes)


def matmul_nbits_graph(folder: Path, bits: int, k: int, n: int, copies: int) -> Graph:
    """ONNX Runtime's MatMulNBits with random weights of ``bits`` bits, block 128, accuracy level 4 (int8 arithmetic)."""
    from onnx import TensorProto

    blocks = -(-k // PEER_BLOCK)
    shape = (n, blocks, PEER_BLOCK * bits // 8)
    nbytes = int(np.prod(shape))
    tensor = _Tensor("B", TensorProto.UINT8, shape, nbytes)
    scales = np.full((n, blocks), SCALE, np.float32)
    _write_weights(folder / f"nbits{bits}.data", copies * nbytes, lambda raw: raw)
    attributes = {"K": k, "N": n, "bits": bits, "block_size": PEER_BLOCK, "accuracy_level": 4}
    path = _save(
        folder / f"nbits{bits}.onnx",
        "MatMulNBits",
        "com.microsoft",
        attributes,
        k,
        n,
        copies,
        tensor,
        nbytes,
        {"scales": scales},
    )
    return Graph(path, copies, nbytes + scales.nbytes)


def topk_graph(folder: Path, k: int, kept: int, copies: int) -> Graph:
    """TopKSparsify of ``kept`` of ``k`` channels; no weights."""
    attributes = {"k": kept, "block": 0, "rescale": "none"}
    path = _save(folder / "topk.onnx", "TopKSparsify", "ai.qsparse", attributes, k, k, copies)
    return Graph(path, copies, 0)


def onnx_topk_graph(folder: Path, k: int, kept: int, copies: int) -> Graph:
    """The selection alone in ONNX's TopK of magnitudes, unsorted: values and indices, not yet a masked row."""
    attributes = {"axis": -1, "largest": 1, "sorted": 0}
    path = _save(
        folder / "onnx_topk.onnx", "TopK", "", attributes, k, kept, copies, small={"kept": np.array([kept], np.int64)}
    )
    return Graph(path, copies, 0)


def _write_weights(path: Path, nbytes: int, code: Callable[[np.ndarray], np.ndarray]) -> None:
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        for start in range(0, nbytes, PIECE_BYTES):
            file.write(code(np.frombuffer(rng.bytes(min(PIECE_BYTES, nbytes - start)), np.uint8)).tobytes())


def _ternary_bytes(raw: np.ndarray) -> np.ndarray:
    """Random bytes with every code 3 made 2: zeros and ones a quarter each, the rest two."""
    return raw & ~(raw >> 1 & raw & 0x55)


def _save(
    path: Path,
    op_type: str,
    domain: str,
    attributes: dict[str, Any],
    k: int,
    n: int,
    copies: int,
    weight: _Tensor | None = None,
    stride: int = 0,
    small: dict[str, np.ndarray] | None = None,
) -> Path:
    import onnx
    from onnx import TensorProto
    from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info
    from onnx.numpy_helper import from_array

    shared = [from_array(value, name) for name, value in (small or {}).items()]
    nodes = []
    for i in range(copies):
        inputs = ["X", *([f"{weight.name}{i}"] if weight else []), *(tensor.name for tensor in shared)]
        outputs = [f"Y{i}"] if op_type != "TopK" else [f"Y{i}", f"I{i}"]
        nodes.append(make_node(op_type, inputs, outputs, domain=domain, **attributes))
    graph = make_graph(
        nodes,
        "bench",
        [make_tensor_value_info("X", TensorProto.FLOAT, ["M", k])],
        [make_tensor_value_info(f"Y{i}", TensorProto.FLOAT, ["M", n]) for i in range(copies)],
        [*shared, *(_external(weight, path, stride, copies) if weight else ())],
    )
    opsets = [make_opsetid("", 21), *([make_opsetid(domain, 1)] if domain else [])]
    onnx.save(make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def _external(weight: _Tensor, path: Path, stride: int, copies: int) -> Iterator[onnx.TensorProto]:
    from onnx import TensorProto

    for i in range(copies):
        tensor = TensorProto(name=f"{weight.name}{i}", data_type=weight.onnx_type, dims=weight.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (
            ("location", path.with_suffix(".data").name),
            ("offset", str(i * stride)),
            ("length", str(weight.nbytes)),
        ):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value
        yield tensor
