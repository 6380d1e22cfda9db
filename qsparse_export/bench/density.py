"""Measures how many channels of every projection are active while a model generates, and the bytes that it then reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsparse_export.bench.prompt import first_token
from qsparse_export.bench.weight_reads import WeightReads, weight_reads
from qsparse_export.errors import BundleError
from qsparse_export.generate import Generator, greedy
from qsparse_export.ops.base import DOMAIN
from qsparse_export.runtimes.base import SessionView

if TYPE_CHECKING:
    from qsparse_export.bundle import Bundle
    from qsparse_export.runtimes.base import Session


@dataclass(frozen=True)
class Activity:
    """Averages over ``tokens`` generated tokens.

    ``density``: linear of a block to the share of its input channels that are active (None: no token reached it);
    ``mean_density``: the same of all of them, weighted by the bytes of their weights. ``bytes_per_token``: bytes of weights
    that one decode step reads, the embedding counted as one row; as far as the kernels of ``skipping_ops`` run and not their
    bodies. ``ops``: all ops of ours in the graph. ``greedy_ids``: the tokens.
    """

    density: dict[str, float | None]
    mean_density: float | None
    bytes_per_token: float
    tokens: int
    skipping_ops: frozenset[str]
    ops: frozenset[str]
    greedy_ids: tuple[int, ...] = ()


def measure_activity(
    bundle: Bundle, graph: Path, *, native: bool, tokens: int, on_token: Callable[[], object]
) -> Activity:
    """Generates ``tokens`` tokens greedily from an empty cache with ``graph`` on the bundle's weights, and counts.

    A channel is active when its weights contribute: it is in the mask, and not zero (as int8, where the op quantises).
    """
    import onnx_ir

    model = onnx_ir.load(graph)
    reads = weight_reads(model.graph)
    taps = tuple(dict.fromkeys(product.x for product in reads.products))
    session = bundle.runtime(native=native).open(bundle.path, threads=None, native=native, taps=taps, graph=graph)
    counter = _Counter(session, reads)
    linears = _block_linears(bundle)
    steps = Generator(counter, bundle.decoder_shape()).steps([first_token(bundle.manifest["model"])])
    chosen: list[int] = []
    for logits, choose in steps:
        on_token()
        chosen.append(greedy(logits[-1]))
        if len(chosen) < tokens:
            choose(chosen[-1])
    return Activity(
        density=counter.density(linears),
        mean_density=counter.mean_density(linears),
        bytes_per_token=counter.bytes_read / tokens + reads.other_bytes,
        tokens=tokens,
        skipping_ops=frozenset(product.op for product in reads.products if product.skips),
        ops=frozenset(node.op_type for node in model.graph.all_nodes() if node.domain == DOMAIN),
        greedy_ids=tuple(chosen),
    )


def _block_linears(bundle: Bundle) -> frozenset[str]:
    """The linears that may be sparse: neither the head nor a router."""
    try:
        return frozenset(row["name"] for row in bundle.manifest["sparsity"])
    except (KeyError, TypeError) as error:
        raise BundleError(
            f"the manifest of {bundle.path} has no table of the sparsity of its linears ({error}); export it again"
        ) from error


class _Counter(SessionView):
    """A session that counts the active channels of every product in each of its runs."""

    def __init__(self, session: Session, reads: WeightReads) -> None:
        super().__init__(session)
        self._reads = reads
        self._active = [0] * len(reads.products)
        self._rows = [0] * len(reads.products)
        self.bytes_read = 0.0

    def run(self, feeds: Mapping[str, Any], results: Mapping[str, Any] | None = None) -> dict[str, Any]:
        outputs = super().run(feeds, results)
        for i, product in enumerate(self._reads.products):
            active = product.active(self._session.to_numpy(outputs[product.x]))
            self._active[i] += int(active.sum())
            self._rows[i] += len(active)
            self.bytes_read += product.bytes_read(active)
        return outputs

    def density(self, linears: frozenset[str]) -> dict[str, float | None]:
        products = enumerate(self._reads.products)
        return {name: self._share(i) for i, product in products for name in product.linears if name in linears}

    def mean_density(self, linears: frozenset[str]) -> float | None:
        total = active = 0.0
        for i, product in enumerate(self._reads.products):
            share = self._share(i)
            if share is not None and linears.intersection(product.linears):
                total += product.weight_bytes
                active += product.weight_bytes * share
        return active / total if total else None

    def _share(self, i: int) -> float | None:
        return self._active[i] / (self._rows[i] * self._reads.products[i].channels) if self._rows[i] else None
