"""Bundle, nn.Module -> Parity: the compiled model against PyTorch, on both ways to run it.

The yardstick is the model's own rounding noise. PyTorch is run again with every layer's input moved by half a unit in the
last place, in random directions: how far its logits move is what *any* correct implementation may differ by, since each
one rounds its sums in another order (and a rounding can flip an int8 value or a top-k choice, whose effect this measures
too). The limit is ``NOISE_FACTOR`` times the largest of ``NOISE_RUNS`` such runs, never below ``FLOOR_ULPS`` units of the
format, never above ``CEILING``: a model that noisy cannot be verified.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from qsparse_export.errors import ParityError
from qsparse_export.generate import DecoderShape, Generator, greedy

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from qsparse_export.config import ModelConfig
    from qsparse_export.runtimes.base import NativeCalls, Runtime, Session

Level = Literal["full", "quick", "none"]

NOISE_RUNS = 3
NOISE_FACTOR = 10.0
FLOOR_ULPS = 512.0
CEILING = 0.2
PROMPT_TOKENS = 24
PROMPT = (
    "The quick brown fox jumps over the lazy dog. In the beginning there was a small machine that could only add two "
    "numbers, and the people who built it dreamt of what it might become."
)


@dataclass(frozen=True)
class PathParity:
    """One way to run the bundle ("native" kernels or function "bodies") against PyTorch.

    Errors are of the logits of the prompt and of every greedy step while the tokens agree: ``max_logit_error`` absolute,
    ``relative_logit_error`` the largest L2 error of a row over that row's L2 norm. ``argmax_agreement`` and
    ``greedy_agreement`` are shares of positions and tokens; a disagreement where PyTorch's own two best logits are closer
    than the limit is a tie, and counted in ``ties``.
    """

    path: str
    max_logit_error: float
    relative_logit_error: float
    argmax_agreement: float
    greedy_agreement: float
    ties: int
    native_calls: NativeCalls


@dataclass(frozen=True)
class Parity:
    """What verification measured; ``limit`` is the relative error allowed, ``noise`` PyTorch's own (see the module)."""

    level: Level
    prompt_tokens: int
    greedy_tokens: int
    noise: float
    limit: float
    paths: tuple[PathParity, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        return asdict(self)


@dataclass(frozen=True)
class Case:
    """What is compared: a PyTorch decoder that is the judge, its shape, and a prompt of token ids."""

    module: torch.nn.Module
    config: ModelConfig
    dtype: str
    prompt: tuple[int, ...]


def prompt_ids(vocab_size: int, tokenizer: Path) -> tuple[int, ...]:
    """``PROMPT_TOKENS`` ids of an English sentence by the bundle's tokenizer, or fixed random ids when it has none."""
    if tokenizer.is_file():
        from tokenizers import Tokenizer

        return tuple(Tokenizer.from_file(str(tokenizer)).encode(PROMPT).ids[:PROMPT_TOKENS])
    return tuple(int(i) for i in np.random.default_rng(0).integers(0, vocab_size, PROMPT_TOKENS))


def verify_decoder(
    folder: Path, runtime: Runtime, graph: ir.Model, case: Case, level: Level, *, native: bool
) -> Parity:
    """Runs the compiled decoder in ``folder`` both ways and compares it with ``case.module``.

    ``full``: native kernels (when ``native``) and function bodies, 32 greedy tokens; ``quick``: the way that the bundle
    will be run, 8 tokens. Raises ParityError that says which way, by how much, and at which layer it first diverged.
    """
    from qsparse_export.nn.session import TorchSession

    count = 32 if level == "full" else 8
    shape = DecoderShape.of(case.config, case.dtype)
    judge = Generator(TorchSession(case.module, case.config.layers), shape)
    expected = _run(judge, case.prompt, count)
    noise = _noise(judge, case, expected)
    limit = max(NOISE_FACTOR * noise, FLOOR_ULPS * float(np.finfo(case.dtype).eps))
    if limit > CEILING:
        raise ParityError(
            f"one rounding error moves the PyTorch model's own logits by {noise:.3g} of their size: no export of it can "
            "be verified; look for diverged weights, or export with --verify none"
        )
    paths = []
    for path in (["native"] if native else []) + (["bodies"] if level == "full" or not native else []):
        session = runtime.open(folder, threads=None, native=path == "native")
        parity = _compare(path, session, shape, case.prompt, expected, limit)
        _require(parity, limit, native_ops(graph), folder, runtime, graph, case)
        paths.append(parity)
    return Parity(level, len(case.prompt), count, noise, limit, tuple(paths))


def native_ops(graph: ir.Model) -> frozenset[str]:
    """Names of the ops of domain ``ai.qsparse`` that the graph uses."""
    return frozenset(node.op_type for node in graph.graph.all_nodes() if node.domain == "ai.qsparse")


@dataclass(frozen=True)
class _Run:
    logits: np.ndarray  # float32 [prompt + steps - 1, vocab]
    tokens: tuple[int, ...]


def _run(generator: Generator, prompt: Sequence[int], count: int) -> _Run:
    rows: list[np.ndarray] = []
    tokens: list[int] = []
    for logits, choose in generator.steps(prompt):
        rows.append(logits)
        tokens.append(greedy(logits[-1]))
        if len(tokens) < count:
            choose(tokens[-1])
    return _Run(np.concatenate(rows), tuple(tokens))


def _noise(judge: Generator, case: Case, expected: _Run) -> float:
    """Largest relative change of a logit row when every decoder layer's input moves by half a unit in the last place."""
    import torch

    ids = (*case.prompt, *expected.tokens[:-1])
    worst = 0.0
    for seed in range(NOISE_RUNS):
        random = torch.Generator().manual_seed(seed)

        def nudge(_: object, inputs: tuple[Any, ...], random: torch.Generator = random) -> tuple[Any, ...]:
            x = inputs[0]
            signs = torch.randint(0, 2, x.shape, generator=random).to(x.dtype) * 2 - 1
            return (x * (1 + signs * torch.finfo(x.dtype).eps / 2 * _NUDGE_ULPS), *inputs[1:])

        hooks = [layer.register_forward_pre_hook(nudge) for layer in _layers(case.module)]
        try:
            worst = max(worst, float(_relative(judge.logits(ids), expected.logits).max()))
        finally:
            for hook in hooks:
                hook.remove()
    return worst


_NUDGE_ULPS = 2.0  # (1 + eps/2) itself rounds back to 1; one whole unit is the smallest nudge that exists


def _layers(module: torch.nn.Module) -> Any:
    return module.model.layers  # type: ignore[union-attr]  # Decoder's naming, Hugging Face's too


def _relative(got: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Per row: L2 norm of the difference over the L2 norm of ``expected``."""
    return np.linalg.norm(got - expected, axis=-1) / np.maximum(np.linalg.norm(expected, axis=-1), 1e-30)


def _compare(
    path: str, session: Session, shape: DecoderShape, prompt: Sequence[int], expected: _Run, limit: float
) -> PathParity:
    got = _run(Generator(session, shape), prompt, len(expected.tokens))
    agreed = next((i for i, (a, b) in enumerate(zip(got.tokens, expected.tokens, strict=True)) if a != b), None)
    # Beyond the first different token the two continue different texts, and their logits cannot be compared.
    rows = len(prompt) + (len(expected.tokens) - 1 if agreed is None else agreed)
    mine, theirs = got.logits[:rows], expected.logits[:rows]
    wrong = np.flatnonzero(mine.argmax(axis=-1) != theirs.argmax(axis=-1))
    return PathParity(
        path=path,
        max_logit_error=float(np.abs(mine - theirs).max()),
        relative_logit_error=float(_relative(mine, theirs).max()),
        argmax_agreement=1.0 - len(wrong) / rows,
        greedy_agreement=(len(expected.tokens) if agreed is None else agreed) / len(expected.tokens),
        ties=sum(_is_tie(theirs[row], limit) for row in wrong),
        native_calls=session.native_calls(),
    )


def _is_tie(logits: np.ndarray, limit: float) -> bool:
    """Whether the two best of ``logits`` are closer than errors of relative size ``limit`` can part."""
    second, best = np.partition(logits, -2)[-2:]
    # Two logits each off by limit * RMS(logits): their difference is off by at most twice that.
    return bool(best - second <= 2 * limit * np.sqrt(np.mean(logits.astype(np.float64) ** 2)))


def _require(
    parity: PathParity,
    limit: float,
    ops: frozenset[str],
    folder: Path,
    runtime: Runtime,
    graph: ir.Model,
    case: Case,
) -> None:
    if parity.path == "native" and (unused := sorted(ops - parity.native_calls.keys())):
        raise ParityError(f"the native kernels of {', '.join(unused)} never ran although the graph uses them")
    rows = len(case.prompt)
    wrong = round((1 - parity.argmax_agreement) * rows) - parity.ties
    if parity.relative_logit_error <= limit and wrong <= 0:
        return
    raise ParityError(
        f"the {parity.path} path differs from PyTorch: logits by {parity.relative_logit_error:.3g} relative "
        f"({parity.max_logit_error:.3g} absolute), allowed {limit:.3g}; argmax agrees on {parity.argmax_agreement:.1%}, "
        f"greedy tokens on {parity.greedy_agreement:.1%}. "
        + _first_divergence(folder, runtime, graph, case, limit, native=parity.path == "native")
    )


def _first_divergence(
    folder: Path, runtime: Runtime, graph: ir.Model, case: Case, limit: float, *, native: bool
) -> str:
    """Says at which decoder layer's output the compiled model leaves PyTorch by more than ``limit``."""
    from qsparse_export.nn.session import TorchSession

    taps = layer_outputs(graph, case.config.layers)
    seen: list[np.ndarray] = []
    hooks = [
        layer.register_forward_hook(
            lambda _m, _i, out: seen.append((out[0] if isinstance(out, tuple) else out).numpy())
        )
        for layer in _layers(case.module)
    ]
    try:
        Generator(TorchSession(case.module, case.config.layers), DecoderShape.of(case.config, case.dtype)).logits(
            case.prompt
        )
    finally:
        for hook in hooks:
            hook.remove()
    session = runtime.open(folder, threads=None, native=native, taps=taps)
    recorder = _Recorder(session)
    Generator(recorder, DecoderShape.of(case.config, case.dtype)).logits(case.prompt)
    for layer, (tap, theirs) in enumerate(zip(taps, seen, strict=True)):
        mine = np.asarray(session.to_numpy(recorder.outputs[tap]), np.float32)
        error = float(_relative(mine[0], np.asarray(theirs[0], np.float32)).max())
        if not error <= limit:  # NaN diverges too
            return f"It first diverges at the output of layer {layer} (relative error {error:.3g})."
    return (
        "Every decoder layer agrees on the prompt: the difference arises in the final norm, the head, or the KV cache."
    )


class _Recorder:
    """A session that keeps the outputs of its last run."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.input_names, self.output_names = session.input_names, session.output_names
        self.outputs: dict[str, Any] = {}

    def run(self, feeds: Any) -> dict[str, Any]:
        self.outputs = self._session.run(feeds)
        return self.outputs

    def to_numpy(self, tensor: Any) -> Any:
        return self._session.to_numpy(tensor)

    def native_calls(self) -> NativeCalls:
        return self._session.native_calls()


def layer_outputs(graph: ir.Model, layers: int) -> tuple[str, ...]:
    """Names of the values that hold each decoder layer's output: the last node that its module made."""
    from qsparse_export.passes.annotate_scope import SCOPE

    last: dict[int, str] = {}
    for node in graph.graph:
        parts = node.metadata_props.get(SCOPE, "").split(".")
        if parts[:2] == ["model", "layers"] and node.outputs[0].name:
            last[int(parts[2])] = node.outputs[0].name
    return tuple(last[layer] for layer in range(layers))
