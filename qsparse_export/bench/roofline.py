"""What a GPU could do at best with a bundle: bytes and operations of one decode step against data sheets, launches included.

Nothing is measured here (bench.gpu does where there is a GPU). A product takes ``max(bytes / bandwidth, operations / peak)``
(S. Williams et al., Roofline, 2009), or the time to launch it where that is longer, since a launch overlaps with the kernel
before it; every other kernel takes at least the time of its launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from qsparse_export.bench.launches import launches
from qsparse_export.bench.weight_reads import Product, WeightReads, weight_reads

if TYPE_CHECKING:
    import onnx_ir as ir

DENSITIES = (0.4, 0.6, 0.8, 1.0)


@dataclass(frozen=True)
class Gpu:
    """``gb_per_s`` of its memory (1e9 bytes), ``int8_tops`` of its tensor cores without structured sparsity (1e12).

    ``reported``: what nvidia-smi calls it; "" where it calls slower ones so too.
    """

    name: str
    gb_per_s: float
    int8_tops: float
    reported: str


# NVIDIA's data sheets.
GPUS = (
    Gpu("H100 SXM 80 GB", 3350, 1979, "NVIDIA H100 80GB HBM3"),
    Gpu("A100 SXM 80 GB", 2039, 624, "NVIDIA A100-SXM4-80GB"),
    Gpu("RTX 4090", 1008, 661, "NVIDIA GeForce RTX 4090"),
    Gpu("Jetson AGX Orin 64 GB", 204.8, 85, ""),
)
LAUNCH_US = 4.0
"""Assumed time of one kernel's launch by a runtime on the CPU."""
GRAPH_LAUNCH_US = 1.3
"""Assumed time from one kernel to the next of a captured CUDA graph."""


@dataclass(frozen=True)
class ProjectionWork:
    """What one token costs in all products of one kind: ``name`` is the linears' last parts, q_proj+k_proj+v_proj.

    ``bytes`` of weights and ``operations`` (two per multiplication) with every channel active; ``skips``: both shrink with
    the density.
    """

    name: str
    products: int
    bytes: int
    operations: int
    skips: bool


@dataclass(frozen=True)
class Expected:
    """Least time of a token on ``gpu`` where the products that skip have ``density``; None: what the graph's masks keep.

    ``launch_share``: of the time, what launches add to the kernels' own, without and with graph capture.
    """

    gpu: str
    density: float | None
    ms_per_token: float
    tokens_per_s: float
    launch_share: float
    captured_ms_per_token: float
    captured_tokens_per_s: float
    captured_launch_share: float


@dataclass(frozen=True)
class Roofline:
    """``work`` by projection, ``other_bytes`` that every token reads besides, ``kernels`` that it launches, and what follows.

    ``kernels``: by op. ``masked_bytes``: all weights that a token reads with the graph's own masks.
    """

    work: tuple[ProjectionWork, ...]
    other_bytes: int
    masked_bytes: float
    kernels: dict[str, int]
    expected: tuple[Expected, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with what was assumed."""
        assumed = {"launch_us": LAUNCH_US, "captured_launch_us": GRAPH_LAUNCH_US, "gpus": [asdict(gpu) for gpu in GPUS]}
        return {"roofline": asdict(self), "assumed": assumed}


def roofline(model: ir.Model, densities: Sequence[float | None] = DENSITIES, gpus: Sequence[Gpu] = GPUS) -> Roofline:
    """Of a decode step of one sequence, its past not counted; no weight is read."""
    reads, kernels = weight_reads(model.graph), launches(model.graph)
    count = sum(kernels.values())
    return Roofline(
        work=_by_projection(reads.products),
        other_bytes=reads.other_bytes,
        masked_bytes=reads.other_bytes
        + sum(product.weight_bytes * _share(product, None) for product in reads.products),
        kernels=kernels,
        expected=tuple(_expected(reads, count, gpu, density) for gpu in gpus for density in densities),
    )


def _by_projection(products: Sequence[Product]) -> tuple[ProjectionWork, ...]:
    found: dict[str, ProjectionWork] = {}
    for product in products:
        name = "+".join(dict.fromkeys(linear.rpartition(".")[2] for linear in product.linears))
        before = found.get(name, ProjectionWork(name, 0, 0, 0, product.skips))
        found[name] = replace(
            before,
            products=before.products + 1,
            bytes=before.bytes + product.weight_bytes,
            operations=before.operations + _operations(product),
        )
    return tuple(found.values())


def _operations(product: Product) -> int:
    return 2 * product.channels * product.outputs


def _share(product: Product, density: float | None) -> float:
    """Of the weights, what is read."""
    if not product.skips:
        return 1.0
    return product.kept / (product.block or product.channels) if density is None else density


def _expected(reads: WeightReads, kernels: int, gpu: Gpu, density: float | None) -> Expected:
    work = [_seconds(product, gpu, density) for product in reads.products]
    rest = reads.other_bytes / (gpu.gb_per_s * 1e9)
    own = sum(work) + rest

    def total(launch_us: float) -> float:
        launch = launch_us * 1e-6
        return sum(max(seconds, launch) for seconds in work) + max(rest, (kernels - len(work)) * launch)

    eager, captured = total(LAUNCH_US), total(GRAPH_LAUNCH_US)
    return Expected(
        gpu=gpu.name,
        density=density,
        ms_per_token=eager * 1e3,
        tokens_per_s=1 / eager,
        launch_share=1 - own / eager,
        captured_ms_per_token=captured * 1e3,
        captured_tokens_per_s=1 / captured,
        captured_launch_share=1 - own / captured,
    )


def _seconds(product: Product, gpu: Gpu, density: float | None) -> float:
    share = _share(product, density)
    moved = product.weight_bytes * share / (gpu.gb_per_s * 1e9)
    return max(moved, _operations(product) * share / (gpu.int8_tops * 1e12))


def spell(found: Roofline) -> str:
    """Markdown: bytes and operations by projection, and what each GPU could do."""
    kernels = sorted(found.kernels.items(), key=lambda item: (-item[1], item[0]))
    lines = [
        "| projection | products | MB per token | million operations | with the density |",
        "|---|---:|---:|---:|---|",
    ]
    for work in found.work:
        shrinks = "shrinks" if work.skips else "stays"
        lines.append(
            f"| {work.name} | {work.products} | {work.bytes / 1e6:.2f} | {work.operations / 1e6:.1f} | {shrinks} |"
        )
    lines += [
        f"| all else | | {found.other_bytes / 1e6:.2f} | | stays |",
        "",
        f"{sum(found.kernels.values())} kernels per token: {', '.join(f'{op} {n}' for op, n in kernels)}.",
        "",
        f"Computed from data sheets, with {LAUNCH_US:g} us for each launch, and {GRAPH_LAUNCH_US:g} us in a captured graph; "
        "launches: their share of the time.",
        "",
        "| GPU | density | ms | tokens/s | launches | captured: ms | tokens/s | launches |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found.expected:
        lines.append(
            f"| {row.gpu} | {row.density:g} | {row.ms_per_token:.2f} | {row.tokens_per_s:.0f} | {row.launch_share:.0%} | "
            f"{row.captured_ms_per_token:.2f} | {row.captured_tokens_per_s:.0f} | {row.captured_launch_share:.0%} |"
        )
    return "\n".join(lines)
