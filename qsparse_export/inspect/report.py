"""Bundle, ONNX file or checkpoint -> Report: one row per product, read from headers and the graph; no weight is read."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsparse_export.bundle import MANIFEST, Bundle
from qsparse_export.errors import BundleError

if TYPE_CHECKING:
    import onnx_ir as ir

    from qsparse_export.checkpoints.model import Model

DOMAIN = "ai.qsparse"
GRAPH = "model.onnx"


@dataclass(frozen=True)
class Layer:
    """One product, or a mask that stands alone.

    ``k`` of ``out_of`` channels are kept at its input (``out_of`` is the row, or a block of it); ``bytes`` are those of
    its constants. ``values`` are the names of its input and output in the graph. What only a run shows is None before one:
    ``measured_density`` is the share of channels that were not 0, ``kernel_error`` the relative distance (L2) of what
    kernels and function bodies gave.
    """

    name: str
    op: str
    inputs: int | None
    outputs: tuple[int, ...]
    format: str
    bytes: int
    k: int | None
    out_of: int | None
    values: tuple[str, str] | None = None
    measured_density: float | None = None
    kernel_error: float | None = None

    @property
    def density(self) -> float | None:
        """The share of channels that the mask keeps."""
        return self.k / self.out_of if self.k is not None and self.out_of else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        plain = asdict(self) | {"density": self.density}
        del plain["values"]
        return plain


@dataclass(frozen=True)
class Report:
    """``kind`` is bundle, onnx or checkpoint; ``facts`` are named texts; ``nodes`` counts of the main graph."""

    name: str
    kind: str
    path: str
    facts: dict[str, str]
    layers: tuple[Layer, ...]
    ops: dict[str, int]
    nodes_before: int | None
    nodes_after: int | None
    files: dict[str, int]
    parity: dict[str, Any] | None
    unfused: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return asdict(self) | {"layers": [layer.to_dict() for layer in self.layers]}

    def with_layers(self, layers: tuple[Layer, ...]) -> Report:
        """The same report of measured layers."""
        return replace(self, layers=layers)


def inspect(path: str | Path) -> Report:
    """The report of a bundle folder, an ONNX file, or any checkpoint that :func:`qsparse_export.load` takes.

    Raises BundleError for a damaged bundle and CheckpointError for a damaged or unknown file.
    """
    folder = Path(path)
    if (folder / MANIFEST).is_file():
        return _bundle(Bundle.load(folder, check=False))
    from qsparse_export.loader import load

    model = load(path)
    return _onnx(model) if model.onnx is not None else _checkpoint(str(path), model)


def _bundle(bundle: Bundle) -> Report:
    manifest = bundle.manifest
    if not (bundle.path / GRAPH).is_file():
        raise BundleError(f"{bundle.path} has no {GRAPH}; there is nothing to show: export the bundle again")
    graph = read_graph(bundle.path)
    target, nodes = manifest["target"], manifest.get("nodes") or {}
    facts = {
        "kind": str(manifest["kind"]),
        "target": f"{target.get('name')} ({target.get('arch')} {target.get('system')})",
        "runtime": str(manifest["runtime"]) + (", native kernels" if manifest["native"] else ", function bodies"),
        "weights": str(manifest.get("weights")),
        "pipeline": str(manifest.get("pipeline")),
        "qsparse-export": str(manifest.get("qsparse_export")),
    }
    return Report(
        name=str(manifest["name"]),
        kind="bundle",
        path=str(bundle.path),
        facts=facts,
        layers=layers_of(graph),
        ops=_ops(graph),
        nodes_before=nodes.get("before"),
        nodes_after=nodes.get("after", len(graph)),
        files={name: int(file["bytes"]) for name, file in manifest["files"].items()},
        parity=manifest.get("parity"),
        unfused=dict(manifest.get("unfused") or {}),
    )


def read_graph(folder: Path) -> ir.Graph:
    """The graph of a bundle, its weights not read; BundleError when it is damaged."""
    import onnx_ir

    try:
        return onnx_ir.load(folder / GRAPH).graph
    except Exception as error:  # protobuf's own errors, and whatever a damaged graph makes of the reader
        raise BundleError(f"{folder / GRAPH} is damaged ({error}); copy or export the bundle again") from error


def _onnx(model: Model) -> Report:
    assert model.onnx is not None and isinstance(model.source, tuple)
    read = model.onnx.read()
    graph = read.graph
    return Report(
        name=model.name,
        kind="onnx",
        path=str(model.onnx.path),
        facts={"opset": str(read.opset_imports.get("")), "producer": read.producer_name or "unknown"},
        layers=layers_of(graph),
        ops=_ops(graph),
        nodes_before=len(graph),
        nodes_after=None,
        files={file.name: file.stat().st_size for file in model.source},
        parity=None,
        unfused={},
    )


def _checkpoint(path: str, model: Model) -> Report:
    from qsparse_export.api import sparsity_table

    config = model.config
    rows = {row["name"]: row for row in sparsity_table(config)} if config is not None else {}
    layers = []
    for name, shape in model.weights.shapes.items():
        stem = name.removesuffix(".weight")
        if len(shape) != 2 or (config is not None and stem not in rows and not stem.endswith("lm_head")):
            continue
        row = rows.get(stem, {"k": shape[1], "block": 0})
        quantised = stem in rows and config is not None and config.quantization == "bitnet"
        n, k = (int(size) for size in shape)
        layers.append(
            Layer(
                name=stem,
                op="linear",
                inputs=k,
                outputs=(n,),
                format="ternary" if quantised else "float",
                bytes=n * k // 4 if quantised else 4 * n * k,
                k=row["k"],
                out_of=row["block"] or k,
            )
        )
    source = model.source if isinstance(model.source, tuple) else ()
    return Report(
        name=model.name,
        kind="checkpoint",
        path=path,
        facts={"format": model.source_format, "architecture": config.architecture if config else "unknown"},
        layers=tuple(layers),
        ops={},
        nodes_before=None,
        nodes_after=None,
        files={file.name: file.stat().st_size for file in source},
        parity=None,
        unfused={},
    )


def _ops(graph: ir.Graph) -> dict[str, int]:
    counts = Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in graph.all_nodes())
    return dict(sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])))


def layers_of(graph: ir.Graph) -> tuple[Layer, ...]:
    """Products with constant weights, and masks in front of something else."""
    from qsparse_export.passes.annotate_scope import SCOPE
    from qsparse_export.passes.annotate_sparsity import PRODUCTS, constant_bytes, selection_of

    layers = []
    for node in graph:
        size = constant_bytes(node)
        is_mask = (node.domain, node.op_type) == (DOMAIN, "TopKSparsify")
        is_product = node.op_type in PRODUCTS or (node.domain == DOMAIN and "n" in node.attributes)
        if not (is_product and size) and not (is_mask and not _feeds_products(node)):
            continue
        selection = selection_of(node) or (None, None)
        x, y = node.inputs[0], node.outputs[0]
        layers.append(
            Layer(
                name=node.metadata_props.get(SCOPE) or node.name or str(y.name),
                op=node.op_type,
                inputs=_width(x),
                outputs=_outputs(node),
                format=_format(node),
                bytes=size,
                k=selection[0],
                out_of=selection[1],
                values=(str(x.name), str(y.name)) if x is not None else None,
            )
        )
    return tuple(layers)


def _feeds_products(mask: ir.Node) -> bool:
    from qsparse_export.passes.annotate_sparsity import PRODUCTS

    readers = [use.node for use in mask.outputs[0].uses()]
    return bool(readers) and all(
        reader.op_type in PRODUCTS or (reader.domain == DOMAIN and "n" in reader.attributes) for reader in readers
    )


def _width(value: ir.Value | None) -> int | None:
    dim = value.shape[-1] if value is not None and value.shape is not None and len(value.shape) else None
    return dim if isinstance(dim, int) else None


def _outputs(node: ir.Node) -> tuple[int, ...]:
    n = node.attributes.get("n")
    if n is not None:
        return tuple(n.as_ints()) if isinstance(n.value, tuple | list) else (n.as_int(),)
    width = _width(node.outputs[0])
    return (width,) if width is not None else ()


def _format(node: ir.Node) -> str:
    if "Ternary" in node.op_type:
        return "ternary"
    bits = node.attributes.get_int("bits", 0)
    if bits:
        return f"int{bits}"
    for value in node.inputs[1:]:
        if value is not None and value.is_initializer() and value.dtype is not None:
            return "float32" if value.dtype.name == "FLOAT" else value.dtype.name.lower()
    return "none"
