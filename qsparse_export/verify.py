"""Bundle, nn.Module -> Parity: the compiled decoder against PyTorch, on both ways to run it.

The compiled model generates; PyTorch follows it token by token with the same discrete choices (:mod:`~qsparse_export.guided`:
top-k masks and int8 roundings, each checked to be a tie where PyTorch alone would have chosen otherwise), so that the logits
must agree to rounding in prefill and in every decode step. How much rounding moves *this* model is measured on PyTorch
itself. See docs/adr/parity-follows-the-choices.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from qsparse_export.errors import ParityError
from qsparse_export.generate import DecoderShape, Generator, greedy
from qsparse_export.rounding import layers_of, nudged, steady_tokens
from qsparse_export.runtimes.base import SessionView

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from qsparse_export.config import ModelConfig
    from qsparse_export.guided import Tap
    from qsparse_export.runtimes.base import NativeCalls, Runtime, Session

Level = Literal["full", "quick", "none"]

NOISE_FACTOR = 4.0
FLOOR = {"float32": 6e-5, "float16": 2e-2}  # 512 and 20 units in the last place: sums of some thousand terms
CEILING = 0.1
GREEDY_TOKENS = {"full": 32, "quick": 8}
PROMPT_TOKENS = 24
PROMPT = (
    "The quick brown fox jumps over the lazy dog. In the beginning there was a small machine that could only add two "
    "numbers, and the people who built it dreamt of what it might become."
)


@dataclass(frozen=True)
class PathParity:
    """One way to run the bundle ("native" kernels or function "bodies") against PyTorch following its choices.

    ``relative_logit_error``: L2 norm of all logit errors (prompt and every greedy step) over that of all logits;
    ``max_logit_error`` the largest absolute one. ``argmax_agreement``: share of these positions with the same argmax;
    ``greedy_agreement``: share of the greedy tokens that PyTorch chooses too. ``flipped_choices``: choices that PyTorch
    alone would have made otherwise, all of them ties up to rounding, of ``choices``; ``flipped_logit_distance``: how far they
    move PyTorch's own logits, relative. ``free_greedy_agreement``: greedy
    tokens until the first difference when PyTorch runs on its own; below 1 only by flipped choices. ``greedy_ids`` are the
    tokens that this way generated after the prompt; any other correct runtime should generate the first
    ``steady_greedy_tokens`` of them, which did not change when rounding was provoked in PyTorch.
    """

    path: str
    relative_logit_error: float
    max_logit_error: float
    argmax_agreement: float
    greedy_agreement: float
    free_greedy_agreement: float
    flipped_choices: int
    flipped_logit_distance: float
    choices: int
    native_calls: NativeCalls
    greedy_ids: tuple[int, ...]
    steady_greedy_tokens: int


@dataclass(frozen=True)
class Parity:
    """What verification measured; ``limit`` is the relative error allowed, ``noise`` how far rounding moves PyTorch."""

    level: Level
    prompt_tokens: int
    prompt_ids: tuple[int, ...]
    greedy_tokens: int
    noise: float
    limit: float
    paths: tuple[PathParity, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        return asdict(self)


@dataclass(frozen=True)
class Case:
    """What is compared: a PyTorch decoder that is the judge, its configuration and number format, and a prompt."""

    module: torch.nn.Module
    config: ModelConfig
    dtype: str
    prompt: tuple[int, ...]

    def judge(self) -> Generator:
        """A generator that runs the PyTorch module."""
        from qsparse_export.nn.session import TorchSession

        return Generator(TorchSession(self.module, self.config.layers), self.shape)

    @property
    def shape(self) -> DecoderShape:
        """What the generation loop must know."""
        return DecoderShape.of(self.config, self.dtype)


def paths_of(runtime: Runtime, level: Level, *, native: bool) -> tuple[str, ...]:
    """The ways to run a bundle that are compared: "native" kernels, function "bodies", or one of them when ``quick``."""
    bodies = runtime.has_bodies and (level == "full" or not native)
    return (("native",) if native else ()) + (("bodies",) if bodies else ())


def prompt_ids(vocab_size: int, tokenizer: Path) -> tuple[int, ...]:
    """``PROMPT_TOKENS`` ids of an English sentence by the bundle's tokenizer, or fixed random ids when it has none."""
    if tokenizer.is_file():
        from tokenizers import Tokenizer

        return tuple(Tokenizer.from_file(str(tokenizer)).encode(PROMPT).ids[:PROMPT_TOKENS])
    return tuple(int(i) for i in np.random.default_rng(0).integers(0, vocab_size, PROMPT_TOKENS))


def verify_decoder(
    folder: Path, runtime: Runtime, graph: ir.Model, case: Case, level: Level, *, native: bool
) -> Parity:
    """Runs the compiled decoder in ``folder`` and compares it with ``case.module``.

    ``full``: native kernels (when ``native``) and function bodies, 32 greedy tokens; ``quick``: the way that the bundle
    will be run, 8 tokens. Raises ParityError that says which way, by how much, and at which layer it first diverged.
    """
    count = GREEDY_TOKENS[level]
    noise, limit = 0.0, 0.0
    steady: dict[tuple[int, ...], int] = {}
    paths: list[PathParity] = []
    for path in paths_of(runtime, level, native=native):
        traced = _trace(folder, runtime, graph, case, count, native=path == "native")
        if not paths:
            noise = _noise(case, traced)
            limit = _limit(noise, case.dtype)
        if traced.tokens not in steady:  # both ways mostly generate the same
            steady[traced.tokens] = steady_tokens(case, traced.ids, traced.tokens)
        parity = _compare(path, case, traced, limit, steady[traced.tokens])
        if path == "native" and (unused := sorted(native_ops(graph) - parity.native_calls.keys())):
            raise ParityError(f"the native kernels of {', '.join(unused)} never ran although the graph uses them")
        # In float16 ONNX Runtime computes in float32 what its CPU provider has no float16 kernel for, and rounds between two
        # such nodes only what is read, as a tap is: ties fall the other way, which moves logits as it moves PyTorch's.
        flips = NOISE_FACTOR * parity.flipped_logit_distance if case.dtype == "float16" else 0.0
        _require_same_untapped(folder, runtime, case, traced, max(limit, flips), native=path == "native")
        paths.append(parity)
    return Parity(level, len(case.prompt), case.prompt, count, noise, limit, tuple(paths))


@dataclass(frozen=True)
class _Trace:
    """A greedy generation of the compiled model: prompt and tokens in one sequence of length S.

    ``logits`` float32 [S, vocab], of every position but the last token's own (or, where the graph leaves them out, but those
    of the prompt before its last); ``choices`` the values of each tap and
    ``layers`` each decoder layer's output, all steps joined along the sequence; ``steps`` the logits as they came.
    """

    ids: tuple[int, ...]
    tokens: tuple[int, ...]
    steps: tuple[np.ndarray, ...]
    choices: tuple[tuple[Tap, np.ndarray], ...]
    layers: tuple[np.ndarray, ...]
    native_calls: NativeCalls

    @property
    def logits(self) -> np.ndarray:
        return np.concatenate(self.steps)


def _trace(folder: Path, runtime: Runtime, graph: ir.Model, case: Case, count: int, *, native: bool) -> _Trace:
    from qsparse_export.guided import choice_taps

    taps = choice_taps(graph)
    layer_values = layer_outputs(graph, case.config.layers)
    names = tuple(dict.fromkeys((*(name for tap in taps for name in tap.values), *layer_values)))
    session = _Recorder(runtime.open(folder, threads=None, native=native, taps=names))
    steps: list[np.ndarray] = []
    tokens: list[int] = []
    seen: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for logits, choose in Generator(session, case.shape).steps(case.prompt):
        steps.append(logits)
        tokens.append(greedy(logits[-1]))
        for name in names:
            seen[name].append(session.to_numpy(session.outputs[name]))
        if len(tokens) < count:
            choose(tokens[-1])
    # Joined along the tokens: [1, S, K] of a step, or [tokens of this step, K] behind a router.
    joined = {name: np.concatenate(values, axis=-2) for name, values in seen.items()}
    return _Trace(
        ids=(*case.prompt, *tokens[:-1]),
        tokens=tuple(tokens),
        steps=tuple(steps),
        choices=tuple((tap, tap.choice_in(joined)) for tap in taps),
        layers=tuple(joined[name] for name in layer_values),
        native_calls=session.native_calls(),
    )


def _compare(path: str, case: Case, traced: _Trace, limit: float, steady: int) -> PathParity:
    """PyTorch on the whole sequence at once, following the choices, against the compiled model's prefill and decode."""
    from qsparse_export.guided import Guide

    guide = Guide(traced.choices, limit)
    with guide, _LayerOutputs(case.module) as outputs:
        theirs = case.judge().logits(traced.ids)
    free = case.judge().logits(traced.ids)
    mine = traced.logits
    left_out = len(theirs) - len(mine)  # positions of the prompt, where the graph gives the last one's logits alone
    theirs, free, first = theirs[left_out:], free[left_out:], len(case.prompt) - 1 - left_out
    same = mine.argmax(axis=-1) == theirs.argmax(axis=-1)
    parity = PathParity(
        path=path,
        relative_logit_error=relative_error(mine, theirs),
        max_logit_error=float(np.abs(mine - theirs).max()),
        argmax_agreement=float(same.mean()),
        greedy_agreement=float(same[first:].mean()),
        # Up to the first difference, PyTorch on its own would have continued with the same tokens.
        free_greedy_agreement=_agreement(traced.tokens, free[first:].argmax(axis=-1).tolist()),
        flipped_choices=guide.flips,
        flipped_logit_distance=relative_error(free, theirs),
        choices=sum(values.size for _, values in traced.choices),
        native_calls=traced.native_calls,
        greedy_ids=traced.tokens,
        steady_greedy_tokens=steady,
    )
    not_tied = [row for row in np.flatnonzero(~same) if not _is_tie(theirs[row], limit)]
    if guide.wrong or not parity.relative_logit_error <= limit or not_tied:
        reasons = [f"At {choice.scope}: {choice.reason}." for choice in guide.wrong[:1]]
        diverged = _first_divergence(traced.layers, outputs.seen, limit)
        reasons.append(
            diverged or "Every layer agrees: the difference arises in the final norm, the head or the KV cache."
        )
        raise ParityError(
            f"the {path} path differs from PyTorch: logits by {parity.relative_logit_error:.3g} relative "
            f"({parity.max_logit_error:.3g} absolute), allowed {limit:.3g}; argmax agrees on "
            f"{parity.argmax_agreement:.1%}, greedy tokens on {parity.greedy_agreement:.1%}. {' '.join(reasons)}"
        )
    return parity


def _require_same_untapped(
    folder: Path, runtime: Runtime, case: Case, traced: _Trace, limit: float, *, native: bool
) -> None:
    """The graph as it is shipped must do what the one with taps did, which was compared."""
    steps = Generator(runtime.open(folder, threads=None, native=native), case.shape).steps(case.prompt)
    for rows, token in zip(traced.steps, traced.tokens, strict=True):
        logits, choose = next(steps)
        if not relative_error(logits, rows) <= limit:
            raise ParityError(
                f"the compiled model gives other logits when its inner values are read ({relative_error(logits, rows):.3g} "
                "relative): an optimisation of the runtime depends on it, and the comparison proves nothing"
            )
        choose(token)


def native_ops(graph: ir.Model) -> frozenset[str]:
    """Names of the ops of domain ``ai.qsparse`` that the graph uses."""
    return frozenset(node.op_type for node in graph.graph.all_nodes() if node.domain == "ai.qsparse")


def _limit(noise: float, dtype: str) -> float:
    limit = max(NOISE_FACTOR * noise, FLOOR[dtype])
    if not limit <= CEILING:
        raise ParityError(
            f"rounding errors move the PyTorch model's own logits by {noise:.3g} of their size: no export of it can be "
            "verified; look for diverged weights, or export with --verify none"
        )
    return limit


def _noise(case: Case, traced: _Trace) -> float:
    """How far PyTorch's logits move, choices held, when each layer's input moves by what its sums may round, and that of
    each n-bit product by what native kernels may round it."""
    from qsparse_export.guided import Guide

    def logits() -> np.ndarray:
        with Guide(traced.choices, CEILING):
            return case.judge().logits(traced.ids)

    still = logits()
    return max(relative_error(moved, still) for moved in nudged(case, logits))


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    """L2 norm of the difference over the L2 norm of ``expected``; NaN where one of them is."""
    wide = expected.astype(np.float64)
    return float(np.linalg.norm(got.astype(np.float64) - wide) / max(float(np.linalg.norm(wide)), 1e-30))


def _agreement(mine: Sequence[int], theirs: Sequence[int]) -> float:
    pairs = enumerate(zip(mine, theirs, strict=True))
    return next((i for i, (a, b) in pairs if a != b), len(mine)) / len(mine)


def _is_tie(logits: np.ndarray, limit: float) -> bool:
    """Whether errors of relative size ``limit`` can swap the two best of ``logits``.

    An error spread evenly moves each logit by ``limit * RMS(logits)``, two of them apart by at most twice that; the tail of
    the distribution is given a factor of three.
    """
    second, best = np.partition(logits, -2)[-2:]
    return bool(best - second <= 6 * limit * np.sqrt(np.mean(logits.astype(np.float64) ** 2)))


def _first_divergence(compiled: Sequence[np.ndarray], judge: Sequence[np.ndarray], limit: float) -> str | None:
    for layer, (mine, theirs) in enumerate(zip(compiled, judge, strict=True)):
        error = relative_error(mine, theirs)
        if not error <= limit:  # NaN diverges too
            return f"It first diverges at the output of layer {layer} (relative error {error:.3g})."
    return None


class _LayerOutputs:
    """While active, collects the output of every decoder layer of a PyTorch module."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self.seen: list[np.ndarray] = []

    def __enter__(self) -> _LayerOutputs:
        def keep(_module: object, _inputs: object, output: Any) -> None:
            self.seen.append((output[0] if isinstance(output, tuple) else output).numpy())

        self._hooks = [layer.register_forward_hook(keep) for layer in layers_of(self._module)]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()


class _Recorder(SessionView):
    """A session that keeps the outputs of its last run."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.outputs: dict[str, Any] = {}

    def run(self, feeds: Mapping[str, Any], results: Mapping[str, Any] | None = None) -> dict[str, Any]:
        self.outputs = super().run(feeds, results)
        return self.outputs


def layer_outputs(graph: ir.Model, layers: int) -> tuple[str, ...]:
    """Names of the values that hold each decoder layer's output: the last node that its module made."""
    from qsparse_export.passes.annotate_scope import SCOPE

    last: dict[int, str] = {}
    for node in graph.graph:
        parts = node.metadata_props.get(SCOPE, "").split(".")
        if parts[:2] == ["model", "layers"] and node.outputs[0].name:
            last[int(parts[2])] = node.outputs[0].name
    return tuple(last[layer] for layer in range(layers))
