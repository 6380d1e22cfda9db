"""``qsparse-bench kernels``: one kernel at many shapes, densities and thread counts, beside its peers and the machine's limit."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qsparse_export.bench import graphs, machine, tvm_peer
from qsparse_export.bench.timing import Contender, Timing, interleave
from qsparse_export.errors import QSparseError, TargetError, UsageError, near_names
from qsparse_export.formats import nbits, ternary
from qsparse_export.runtimes.ort import library

OPS = ("ternary", "nbits", "head", "topk")
PEERS = ("ort", "tvm")
_PREFIXES = ("ort-", tvm_peer.PREFIX)
COLD_BYTES = 256_000_000
LARGEST_Q = 127
TOPK_NODES = 64
HOT_REPEATS = 32
"""Calls in a turn of a cache-resident contender, so that what the others evicted weighs little."""
OURS = "qsparse"


@dataclass(frozen=True)
class Case:
    """One measurement: x [m, k] of which ``round(density * k)`` channels per row are not zero, weights [n, k].

    ``bits`` and ``group`` (inputs that share a scale) are those of the ops nbits and head.
    """

    op: str
    m: int
    k: int
    n: int
    density: float
    threads: int
    variant: str | None = None
    hot: bool = False
    peers: tuple[str, ...] = ()
    bits: int = 4
    group: int = 128

    @property
    def kept(self) -> int:
        """Active channels per row."""
        return round(self.density * self.k)


def check(case: Case) -> None:
    """UsageError when ``case`` asks for what does not exist."""
    if case.op not in OPS:
        raise UsageError(f"--op {case.op}: this version has no such kernel; {near_names(case.op, OPS)}")
    for peer in case.peers:
        if peer not in PEERS:
            raise UsageError(f"--peers {peer}: unknown peer; {near_names(peer, PEERS)}")
    if min(case.m, case.k, case.n, case.threads) < 1:
        raise UsageError(f"m {case.m}, k {case.k}, n {case.n}, threads {case.threads}; expected 1 or more of each")
    if not 0 <= case.density <= 1:
        raise UsageError(f"--density {case.density}; expected a share of active channels, 0 to 1")
    if case.op == "head" and case.density != 1:
        raise UsageError(f"--op head --density {case.density}: the head skips nothing; expected --density 1")
    if case.bits not in nbits.BITS:
        raise UsageError(f"--bits {case.bits}; expected 4 or 8")
    if case.group < 1 or case.group % nbits.WORDS:
        raise UsageError(f"--group {case.group}; expected a positive multiple of {nbits.WORDS}")


def measure(case: Case, seconds: float) -> dict[str, Any]:
    """One row of the report (docs/benchmarks.md says what each entry means); about ``seconds`` per contender.

    Raises UsageError for a case that does not exist, TargetError for a variant that this machine cannot run, and
    QSparseError when the kernel's result is wrong.
    """
    check(case)
    lib = library.open_library()
    with tempfile.TemporaryDirectory(prefix="qsparse-bench-") as folder, _forced(case.variant):
        variant = lib.chosen()
        probe = machine.Probe(lib, case.threads)
        try:
            setup = _SETUPS[case.op](case, Path(folder), probe)
            timings = interleave(setup.contenders, seconds)
        finally:
            probe.close()
    return _row(case, variant, setup, timings)


def describe() -> dict[str, Any]:
    """The machine, for the head of a report."""
    return machine.describe(library.open_library())


@dataclass(frozen=True)
class _Setup:
    """What is timed, and the bytes that one repeat of our kernel reads of its weights (or of x, where it has none)."""

    contenders: dict[str, Contender]
    active_bytes: int
    total_bytes: int


@contextlib.contextmanager
def _forced(variant: str | None) -> Iterator[None]:
    """Within it, QSPARSE_VARIANT is ``variant`` (None: as it is)."""
    before = os.environ.get(library.FORCE_VARIABLE)
    if variant is not None:
        os.environ[library.FORCE_VARIABLE] = variant
    try:
        yield
    finally:
        os.environ.pop(library.FORCE_VARIABLE, None)
        if before is not None:
            os.environ[library.FORCE_VARIABLE] = before


def activations(case: Case, rng: np.random.Generator) -> np.ndarray:
    """float32 [m, k] of whole numbers, the largest 127, so that the quantiser leaves them as they are."""
    x = np.zeros((case.m, case.k), np.float32)
    for row in x:
        active = rng.permutation(case.k)[: case.kept]
        row[active] = rng.integers(1, LARGEST_Q + 1, case.kept) * rng.choice((-1, 1), case.kept)
        row[active[:1]] = LARGEST_Q
    return x


def _ternary(case: Case, folder: Path, probe: machine.Probe) -> _Setup:
    row_bytes = ternary.row_bytes(case.n)
    x = activations(case, np.random.default_rng(1))
    graph = graphs.ternary_graph(folder, case.k, case.n, _copies(case, case.k * row_bytes))
    judge = _ternary_judge(graph, case, x)
    contenders = _ours(case, graph, x, case.n, judge)
    if "ort" in case.peers:
        for bits in (2, 4):
            peer_bytes = case.k * case.n * bits // 8
            peer = graphs.matmul_nbits_graph(folder, bits, case.k, case.n, _copies(case, peer_bytes))
            contenders[f"ort-{bits}bit"] = _contender(peer, case, x, case.n, native=False)
    active = np.flatnonzero((x != 0).any(0))
    contenders |= dict(_probes(probe, case, graph, active, row_bytes))
    return _Setup(contenders, len(active) * row_bytes, case.k * row_bytes)


def _nbits(case: Case, folder: Path, probe: machine.Probe) -> _Setup:
    row_bytes = nbits.columns(case.n) * case.bits // 8
    x = activations(case, np.random.default_rng(1))
    copies = _copies(case, case.k * row_bytes)
    graph = graphs.sparse_nbits_graph(folder, case.bits, case.group, case.k, case.n, copies)
    packed = np.fromfile(graph.weights or "", np.uint8, graph.weight_bytes).reshape(case.k, -1)
    judge = _integer_judge(case, x, nbits.unpack_channels(packed, case.n, case.bits))
    contenders = _ours(case, graph, x, case.n, judge)
    contenders |= _matmul_nbits_peer(case, folder, x)
    active = np.flatnonzero((x != 0).any(0))
    contenders |= dict(_probes(probe, case, graph, active, row_bytes))
    scale_bytes = 2 * nbits.columns(case.n)
    groups_read = len(np.unique(active // case.group))
    total = case.k * row_bytes + nbits.group_count(case.k, case.group) * scale_bytes
    return _Setup(contenders, len(active) * row_bytes + groups_read * scale_bytes, total)


def _head(case: Case, folder: Path, probe: machine.Probe) -> _Setup:
    row_bytes = nbits.output_row_bytes(case.k, case.bits)
    x = activations(case, np.random.default_rng(1))
    copies = _copies(case, case.n * row_bytes)
    graph = graphs.dense_nbits_graph(folder, case.bits, case.group, case.k, case.n, copies)
    packed = np.fromfile(graph.weights or "", np.uint8, graph.weight_bytes).reshape(case.n, -1)
    judge = _integer_judge(case, x, nbits.unpack_outputs(packed, case.k, case.bits))
    contenders = _ours(case, graph, x, case.n, judge)
    contenders |= _matmul_nbits_peer(case, folder, x)
    # Only streaming: every row is read.
    probe_bytes = row_bytes // 32 * 32
    contenders |= dict(_probes(probe, case, graph, np.arange(case.n), probe_bytes)) if probe_bytes else {}
    nbytes = case.n * (row_bytes + 2 * nbits.group_count(case.k, case.group))
    return _Setup(contenders, nbytes, nbytes)


def _ours(
    case: Case, graph: graphs.Graph, x: np.ndarray, n: int, judge: Callable[[np.ndarray], None]
) -> dict[str, Contender]:
    """Our kernel in ONNX Runtime and, where asked for, as TVM compiles it; both are judged."""
    contenders = {OURS: _contender(graph, case, x, n, native=True, judge=judge)}
    if "tvm" in case.peers:
        name, contender = tvm_peer.contender(case, graph, x, HOT_REPEATS if case.hot else 1, judge)
        contenders[name] = contender
    return contenders


def _matmul_nbits_peer(case: Case, folder: Path, x: np.ndarray) -> dict[str, Contender]:
    if "ort" not in case.peers:
        return {}
    copies = _copies(case, case.k * case.n * case.bits // 8)
    peer = graphs.matmul_nbits_graph(folder, case.bits, case.k, case.n, copies)
    return {f"ort-{case.bits}bit": _contender(peer, case, x, case.n, native=False)}


def _integer_judge(case: Case, x: np.ndarray, codes: np.ndarray) -> Callable[[np.ndarray], None]:
    """All scales are ``SCALE`` and x holds whole numbers: float32 sums round only by the scale, once per group or so."""
    scale = np.float64(np.float16(graphs.SCALE))
    expected = (x[:1].astype(np.float64) @ codes.T.astype(np.float64)) * scale
    size = np.abs(x[:1]).astype(np.float64).sum() * (1 << case.bits) * scale
    allowed = 2 * (case.k + 16) * 2.0**-24 * size

    def judge(y: np.ndarray) -> None:
        if not (np.abs(y[:1] - expected) <= allowed).all():
            raise QSparseError(
                f"the kernel computed a wrong product at {case}: nothing was measured; please report this"
            )

    return judge


def _copies(case: Case, nbytes: int) -> int:
    return 1 if case.hot else max(2, -(-COLD_BYTES // nbytes))


def _ternary_judge(graph: graphs.Graph, case: Case, x: np.ndarray) -> Callable[[np.ndarray], None]:
    assert graph.weights is not None
    packed = np.fromfile(graph.weights, np.uint8, graph.weight_bytes).reshape(case.k, -1)
    weights = ternary.unpack(packed, case.n).astype(np.float32)  # sums below 2**24 are exact
    expected = (x[:1] @ weights.T) * np.float32(graphs.SCALE)

    def judge(y: np.ndarray) -> None:
        if not np.array_equal(y[:1], expected):
            raise QSparseError(
                f"the kernel computed a wrong product at {case}: nothing was measured; please report this"
            )

    return judge


def _probes(
    probe: machine.Probe, case: Case, graph: graphs.Graph, active: np.ndarray, row_bytes: int
) -> Iterator[tuple[str, Contender]]:
    """Streaming: every row of every copy in order. Gather: the active rows, in the order in which the kernel reads them."""
    assert graph.weights is not None
    whole = np.fromfile(graph.weights, np.uint8)  # in huge pages, for which NumPy asks, as the kernels' weights are
    rows = whole[: len(whole) // row_bytes * row_bytes].reshape(-1, row_bytes)
    starts = np.arange(graph.copies, dtype=np.int64) * (graph.stride // row_bytes)
    repeats = HOT_REPEATS if case.hot else 1

    def contender(channels: np.ndarray, reading: machine.Reading) -> Contender:
        index = np.tile((starts[:, None] + channels).ravel(), repeats)
        return Contender(lambda: probe.read(rows, index, reading), graph.copies * repeats)

    for i, reading in enumerate(machine.READINGS):
        yield f"stream {i}", contender(np.arange(graph.weight_bytes // row_bytes), reading)
        if len(active):
            yield f"gather {i}", contender(active, reading)


def _topk(case: Case, folder: Path, _probe: machine.Probe) -> _Setup:
    x = np.random.default_rng(1).standard_normal((case.m, case.k)).astype(np.float32)

    def judge(y: np.ndarray) -> None:
        if ((y != 0).sum(axis=-1) != case.kept).any() or (y[y != 0] != x[y != 0]).any():
            raise QSparseError(f"the kernel kept wrong channels at {case}: nothing was measured; please report this")

    ours = graphs.topk_graph(folder, case.k, case.kept, TOPK_NODES)
    contenders = _ours(case, ours, x, case.k, judge)
    if "ort" in case.peers:
        peer = graphs.onnx_topk_graph(folder, case.k, case.kept, TOPK_NODES)
        contenders["ort-topk"] = _contender(peer, case, np.abs(x), case.kept, native=False)
    return _Setup(contenders, x.nbytes, x.nbytes)


_SETUPS: dict[str, Callable[[Case, Path, machine.Probe], _Setup]] = {
    "ternary": _ternary,
    "nbits": _nbits,
    "head": _head,
    "topk": _topk,
}


def _contender(
    graph: graphs.Graph,
    case: Case,
    x: np.ndarray,
    n: int,
    *,
    native: bool,
    judge: Callable[[np.ndarray], None] | None = None,
) -> Contender:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = case.threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # spinning threads would slow the others
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # equal nodes stay apart
    if native:
        options.register_custom_ops_library(str(library.library_path()))
    try:
        session = onnxruntime.InferenceSession(str(graph.path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a class per status code, without a common base of their own
        raise TargetError(f"ONNX Runtime {onnxruntime.__version__} refused {graph.path.name}: {error}") from error
    y = np.zeros((len(x), n), np.float32)  # every node's result: the last one stays
    binding = session.io_binding()
    binding.bind_cpu_input("X", x)
    for output in session.get_outputs():
        binding.bind_output(output.name, "cpu", 0, np.float32, y.shape, y.ctypes.data)
    if judge is not None:
        judge(session.run(["Y0"], {"X": x})[0])

    calls = HOT_REPEATS if case.hot else 1

    def run(keep: object = (x, y)) -> None:
        for _ in range(calls):
            session.run_with_iobinding(binding)

    return Contender(run, graph.copies * calls)


def _row(case: Case, variant: str, setup: _Setup, timings: Mapping[str, Timing]) -> dict[str, Any]:
    ours = timings[OURS]
    stream = _best_gb_per_s(timings, "stream", setup.total_bytes)
    gather = _best_gb_per_s(timings, "gather", setup.active_bytes)
    active = setup.active_bytes / ours.min_us / 1e3
    products = 2 * case.m * case.k * case.n if case.op != "topk" else 0
    return {
        "op": case.op,
        "variant": variant,
        "m": case.m,
        "k": case.k,
        "n": case.n if case.op != "topk" else None,
        "bits": {"ternary": 2, "topk": None}.get(case.op, case.bits),
        "group": case.group if case.op in ("nbits", "head") else None,
        "density": case.density,
        "threads": case.threads,
        "hot": case.hot,
        "rounds": ours.rounds,
        "min_us": ours.min_us,
        "median_us": ours.median_us,
        "p90_us": ours.p90_us,
        "active_bytes": setup.active_bytes,
        "total_bytes": setup.total_bytes,
        "active_gb_per_s": active,
        "stream_gb_per_s": stream,
        "gather_gb_per_s": gather,
        "limit_fraction": active / gather if gather else None,
        "gops": products / ours.min_us / 1e3 if products else None,
        "peers": {
            name: {
                "min_us": timing.min_us,
                "median_us": timing.median_us,
                "p90_us": timing.p90_us,
                "ratio": timing.median_us / ours.median_us,
                "min_ratio": timing.min_us / ours.min_us,
            }
            for name, timing in timings.items()
            if name.startswith(_PREFIXES)
        },
    }


def _best_gb_per_s(timings: Mapping[str, Timing], kind: str, nbytes: int) -> float | None:
    times = [timing.min_us for name, timing in timings.items() if name.startswith(f"{kind} ")]
    return nbytes / min(times) / 1e3 if times else None
